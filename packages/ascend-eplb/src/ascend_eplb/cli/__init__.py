# SPDX-License-Identifier: Apache-2.0
"""The command `ascend-eplb`. Needs the extra `ascend-eplb[cli]`, and says so in one line where it is missing."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; arguments default to those of the process."""
    try:
        from ascend_eplb.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("typer", "rich"):
            raise
        print(f"ascend-eplb: needs {error.name}: pip install 'ascend-eplb[cli]'", file=sys.stderr)
        return 1
    return run(arguments)
