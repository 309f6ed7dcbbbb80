# SPDX-License-Identifier: Apache-2.0
"""Imports torch before pytest makes errors of warnings: torch_npu's own source has some (invalid escape sequences). Helpers are imported by name."""

import sys
import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
