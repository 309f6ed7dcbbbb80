# SPDX-License-Identifier: Apache-2.0
"""Spawned processes import the cases by name, so this folder is on their path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
