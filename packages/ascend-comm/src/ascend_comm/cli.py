# SPDX-License-Identifier: Apache-2.0
"""Command line entry point. The commands are in `show`, which needs the extra ``ascend-comm[cli]``."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run ``ascend-comm``. Returns the exit status: 0, 1 for invalid sizes or a missing extra, 2 for wrong usage."""
    try:
        from ascend_comm.show import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"ascend-comm: {missing} is not installed; pip install 'ascend-comm[cli]'", file=sys.stderr)
        return 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
