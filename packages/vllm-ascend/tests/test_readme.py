# SPDX-License-Identifier: Apache-2.0
"""The README's example prints what the README says, and its table names the kernels that there are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_ascend import kernels

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_prints_what_it_says(smollm2, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    (tmp_path / "smollm2").symlink_to(smollm2)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert expected in done.stdout


def test_the_table_of_kernels_is_complete():
    source = Path(kernels.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"`(npu_\w+)`", README)) == set(re.findall(r"_npu\(\)\.(npu_\w+)", source))
