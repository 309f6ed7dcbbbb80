# SPDX-License-Identifier: Apache-2.0
"""Command line entry point. The commands are in `show`, which needs the extra ``ascend-comm[cli]``."""

import os
import sys
from pathlib import Path

__all__ = ["main"]


def main() -> int:
    """Run ``ascend-comm``. Returns the exit status: 0, 1 for invalid sizes, a missing extra, or a standard
    output that is closed or full, 2 for wrong usage.
    """
    try:
        from ascend_comm.show import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"ascend-comm: {missing} is not installed; pip install 'ascend-comm[cli]'", file=sys.stderr)
        return 1
    if sys.stdout is None:  # closed before the start: nothing is printed, as with Python's print
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        return _no_output(error)
    return status


def _no_output(error: OSError) -> int:
    """Say that standard output cannot be written, unless its reader has closed it, and drop what is left; the exit status."""
    if not isinstance(error, BrokenPipeError):
        print(f"ascend-comm: standard output cannot be written: {error.strerror or error}", file=sys.stderr)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return 1


if __name__ == "__main__":
    sys.exit(main())
