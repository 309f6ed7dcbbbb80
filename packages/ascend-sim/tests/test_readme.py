# SPDX-License-Identifier: Apache-2.0
"""The README's example prints what the README says, and its table names the variables that exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_it_says():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, check=True)
    assert done.stdout == expected


def test_the_table_of_variables_is_complete():
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*") if path.suffix in {".py", ".h", ".cpp"}
    )
    documented = set(re.findall(r"^\| `(ASCEND_SIM\w*)`", README, re.MULTILINE))
    internal = {"ASCEND_SIM_MEMORY_BYTES"}  # from the loader to the stub
    assert documented == set(re.findall(r"\bASCEND_SIM(?:_[A-Z]+)*\b", sources)) - internal
