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


def run(*arguments, env=None):
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_neither_vllm_nor_torch_npu():
    code = "import sys, ascend_moe; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run("-W", "error", "-c", code, env=ENV).split())
    assert {"torch", "ascend_comm"} <= loaded
    assert not {"vllm", "torch_npu", "transformers", "ascend_eplb", "vllm_ascend"} & loaded


def test_the_readme_examples_run(tmp_path):
    readme = (PACKAGE / "README.md").read_text()
    layer, routing = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    script = tmp_path / "layer.py"  # its processes import it
    script.write_text(layer)
    (expected,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    assert sorted(run(str(script)).splitlines()) == sorted(expected.splitlines())
    assert run("-W", "error", "-c", routing, env=ENV).startswith("tokens per slot: [")


def test_it_is_typed_and_its_version_is_in_the_changelog():
    assert files("ascend_moe").joinpath("py.typed").is_file()
    assert f"## {version('ascend-moe')}\n" in (PACKAGE / "CHANGELOG.md").read_text()


def test_the_public_names_are_the_modules_own():
    for name in ascend_moe.__all__:
        found = getattr(ascend_moe, name)
        if hasattr(found, "__module__") and found.__module__.startswith("ascend_moe"):
            assert name in sys.modules[found.__module__].__all__
