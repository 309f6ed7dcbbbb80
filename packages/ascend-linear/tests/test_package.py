# SPDX-License-Identifier: Apache-2.0
"""What importing the package brings along, and the examples of the README and of docs/add-an-op.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import ascend_linear
import pytest
from spawned import NO_NPU

ROOT = Path(__file__).parents[3]
README = Path(__file__).parents[1] / "README.md"


def test_import_needs_neither_vllm_nor_an_npu():
    code = "import sys, ascend_linear; print(*sorted({'vllm', 'torch_npu', 'torch', 'ascend_comm'} & set(sys.modules)))"
    environment = os.environ | NO_NPU
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=1800)
    assert done.stdout.split() == ["ascend_comm", "torch"]


def test_only_kernels_names_torch_npu():
    files = Path(ascend_linear.__file__).parent.glob("*.py")
    assert [path.name for path in files if re.search(r"import\b.*torch_npu", path.read_text())] == ["kernels.py"]


def test_all_is_complete():
    assert ascend_linear.__all__ == sorted(ascend_linear.__all__)
    assert all(hasattr(ascend_linear, name) for name in ascend_linear.__all__)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "add-an-op.md"], ids=lambda page: page.name)
def test_example(page, tmp_path):
    code, output = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", page.read_text(), re.DOTALL).groups()
    script = tmp_path / "example.py"
    script.write_text(code)
    command, environment = [sys.executable, script], os.environ | NO_NPU
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output
