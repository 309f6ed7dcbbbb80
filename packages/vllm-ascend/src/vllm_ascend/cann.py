# SPDX-License-Identifier: Apache-2.0
"""Which CANN the installed torch-npu needs, by the table in its own metadata."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, metadata

__all__ = ["Needed", "needed", "older_than_needed"]

# "| CANN 8.5.0 | 2.12.0 | 2.12.0rc1 | v2.12.0 |"; a row without a CANN belongs to the one above it.
ROW = re.compile(r"^\|\s*(?:CANN ([\w.]+))?\s*\|\s*(\d[\w.]*)\s*\|\s*(\d[\w.]*)\s*\|")

Needed = tuple[str, str]
"""A version of PyTorch in the table, and the oldest CANN beside it."""


def needed(table: str, torch_version: str) -> Needed | None:
    """The row for this version of PyTorch, or for the latest one before it, since a wheel's table may end before the wheel's own version.

    Args:
        table: text with the table of CANN and PyTorch versions.
        torch_version: such as "2.13.0".
    """
    found: dict[tuple[int, ...], Needed] = {}
    cann = ""
    for line in table.splitlines():
        if row := ROW.match(line.strip()):
            cann = row[1] or cann
            found[_numbers(row[2])] = row[2], cann  # later rows have older CANNs
    fitting = [numbers for numbers in found if numbers <= _numbers(torch_version)]
    return found[max(fitting)] if fitting else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def older_than_needed(torch_version: str) -> str | None:
    """A sentence about a CANN that is older than the wheel's table wants; None where it is not, or the table says nothing. Needs torch_npu."""
    try:
        row = needed(str(metadata("torch-npu").json.get("description", "")), torch_version)
    except PackageNotFoundError:
        return None
    utils = importlib.import_module("torch_npu.npu.utils")
    if row is None or utils._is_gte_cann_version(row[1]):
        return None
    by, cann = row
    return (
        f"CANN {utils.get_cann_version()} is older than {cann}, which torch-npu {torch_version} names in its metadata for PyTorch {by}; "
        f"install CANN {cann} or later"
    )
