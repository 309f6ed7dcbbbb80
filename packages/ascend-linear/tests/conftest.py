# SPDX-License-Identifier: Apache-2.0
"""Spawned processes import the cases by name, so this folder is on their path.

torch is imported before pytest makes errors of warnings: torch_npu's own source has some (invalid escape sequences).
"""

import sys
import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
