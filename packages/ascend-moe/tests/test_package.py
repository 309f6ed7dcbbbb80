# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: what importing it pulls in, that the README's example runs, that it is typed."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import ascend_moe

PACKAGE = Path(__file__).parents[1]
# torch itself loads device backends that are installed; what this package imports is another matter.
ENV = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=ENV, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_neither_vllm_nor_torch_npu():
    loaded = run("import sys, ascend_moe; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    assert "torch" in loaded
    assert not {"vllm", "torch_npu", "transformers", "ascend_comm", "ascend_eplb", "ascend_sim", "vllm_ascend"} & set(
        loaded
    )


def test_the_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert run(blocks[0]).startswith("tokens per slot: [")


def test_it_is_typed_and_its_version_is_in_the_changelog():
    assert files("ascend_moe").joinpath("py.typed").is_file()
    assert f"## {version('ascend-moe')}\n" in (PACKAGE / "CHANGELOG.md").read_text()


def test_the_public_names_are_the_modules_own():
    modules = (ascend_moe.choose, ascend_moe.load, ascend_moe.routing)
    assert sorted(name for module in modules for name in module.__all__) == sorted(ascend_moe.__all__)
