# SPDX-License-Identifier: Apache-2.0
"""Relaxed mode, which a process reads once: the float32 and float16 cases of the other modules in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


def test_other_dtypes_in_relaxed_mode():
    modules = sorted(str(p) for p in Path(__file__).parent.glob("test_kernels_*.py") if p.name != Path(__file__).name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "float32 or float16", *modules]
    done = subprocess.run(
        command, env=os.environ | {"ASCEND_SIM_STRICT": "0"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
