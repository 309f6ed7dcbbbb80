# SPDX-License-Identifier: Apache-2.0
"""What the simulator says on standard error. Nothing fails because it cannot be said."""

from __future__ import annotations

import contextlib
import sys

__all__ = ["say"]


def say(line: str) -> None:
    """Write a line to standard error, unless that is closed, full or missing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # ValueError: closed; AttributeError: None
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
