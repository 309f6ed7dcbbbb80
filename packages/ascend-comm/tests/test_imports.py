# SPDX-License-Identifier: Apache-2.0
"""What importing the package loads, and which file may name torch_npu."""

import re
import subprocess
import sys
from pathlib import Path

import ascend_comm
import pytest

PURE = ("ascend_comm", "ascend_comm.topology", "ascend_comm.config", "ascend_comm.hccl", "ascend_comm.cli")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=1800)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", PURE)
def test_what_is_pure_loads_neither_torch_nor_numpy(module):
    loaded = loaded_by(f"import {module}")
    assert "ascend_comm" in loaded
    assert loaded.isdisjoint({"torch", "torch_npu", "vllm", "numpy", "typer", "rich"})


def test_all_of_it_loads_neither_vllm_nor_torch_npu():
    loaded = loaded_by("from ascend_comm import *; import ascend_comm.kernels, ascend_comm.show")
    assert "torch" in loaded
    # Where torch_npu is installed, torch itself loads it as a device backend: that is no doing of this package.
    assert (loaded - loaded_by("import torch")).isdisjoint({"vllm", "torch_npu"})


def test_only_kernels_names_torch_npu():
    files = Path(ascend_comm.__file__).parent.glob("*.py")
    naming = [path.name for path in files if re.search(r"(import |import_module\(\")torch_npu", path.read_text())]
    assert naming == ["kernels.py"]


def test_every_public_name_is_there():
    for name in ascend_comm.__all__:
        assert getattr(ascend_comm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ascend_comm.nothing  # noqa: B018
