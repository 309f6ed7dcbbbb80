# SPDX-License-Identifier: Apache-2.0
"""What every command prints, one JSON object or tables on standard output and the reason of a failure on standard error,
and the check that no output file is an input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.text import Text

from ascend_eplb.cli.render import summary_table
from ascend_eplb.placement import Placement

__all__ = ["check_outputs", "discard", "errors", "print_error", "print_json", "print_summary"]


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Refuse to write over a file that the command reads, or to write two results to one file.

    No command works in place: a recorded load cannot be made again, and moves are counted from the placement in force.

    Args:
        outputs: the option or argument of each file written, and its path; None where it is not given.
        inputs: the same for each file read.

    Raises:
        ValueError: two of them are one file, also by a link; names both.
    """
    written = [(name, path) for name, path in outputs.items() if path is not None]
    read = [(name, path) for name, path in inputs.items() if path is not None]
    for index, (name, path) in enumerate(written):
        for other, used in [*read, *written[:index]]:
            if _is_same_file(path, used):
                raise ValueError(f"{name}={path} would replace {other}={used}, the same file: name another one")


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one does not exist, or cannot be looked at
        return os.path.realpath(one) == os.path.realpath(other)


def discard(stream: TextIO) -> None:
    """Send what is still buffered for a standard stream nowhere, after a write to it has failed.

    The interpreter writes it at its end, where a second failure would be a message and the exit status 120.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def errors() -> Console:
    """The console of standard error, where progress goes too."""
    return Console(stderr=True)


def print_error(message: str) -> None:
    """Print one line with the reason, wrapped by the terminal only. Does nothing if standard error cannot be written."""
    try:
        errors().print(Text.assemble(("error: ", "bold red"), " ".join(message.split())), soft_wrap=True)
    except OSError:
        discard(sys.stderr)


def print_json(**fields: Any) -> None:
    """Print one JSON object in one line; arrays become lists."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    sys.stdout.write(json.dumps(fields, default=plain) + "\n")


def print_summary(placement: Placement, title: str, as_json: bool, **fields: Any) -> None:
    """Print the sizes of a placement under a title, or with these fields in JSON."""
    if as_json:
        print_json(
            **fields, layers=placement.layers, experts=placement.num_experts, ranks=placement.ranks,
            slots_per_rank=placement.slots_per_rank, slots=placement.slots, redundant=placement.redundant,
        )  # fmt: skip
    else:
        Console().print(summary_table(placement, title))
