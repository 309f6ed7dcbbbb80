# SPDX-License-Identifier: Apache-2.0
"""`python -m ascend_sim.contracts PATH` writes the page of all rules to PATH."""

import argparse
import os
import tempfile
from pathlib import Path

from ascend_sim.contracts import contracts
from ascend_sim.contracts.page import page


def main() -> None:
    """Write the page; the file at PATH is replaced as a whole or not at all."""
    parser = argparse.ArgumentParser(prog="python -m ascend_sim.contracts", description="Write the page of all rules.")
    parser.add_argument("path", type=Path, help="such as docs/kernels.md")
    path = parser.parse_args().path
    try:
        text = page(contracts())
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".kernels-", delete=False, encoding="utf-8"
        ) as file:
            made = Path(file.name)
            try:
                file.write(text)
                file.flush()
                made.chmod(0o644)
                os.replace(made, path)
            except BaseException:
                made.unlink(missing_ok=True)
                raise
    except (OSError, ValueError) as error:
        raise SystemExit(f"ascend_sim.contracts: {error}") from error


if __name__ == "__main__":
    main()
