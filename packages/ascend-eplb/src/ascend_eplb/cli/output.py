# SPDX-License-Identifier: Apache-2.0
"""What every command prints: one JSON object or tables on standard output, the reason of a failure on standard error."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from ascend_eplb.cli.render import summary_table
from ascend_eplb.placement import Placement

__all__ = ["errors", "print_error", "print_json", "print_summary"]


def errors() -> Console:
    """The console of standard error, where progress goes too."""
    return Console(stderr=True)


def print_error(message: str) -> None:
    """One line with the reason, wrapped by the terminal only."""
    errors().print(Text.assemble(("error: ", "bold red"), " ".join(message.split())), soft_wrap=True)


def print_json(**fields: Any) -> None:
    """One JSON object in one line; arrays become lists."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    sys.stdout.write(json.dumps(fields, default=plain) + "\n")


def print_summary(placement: Placement, title: str, as_json: bool, **fields: Any) -> None:
    """The sizes of a placement under a title, or with these fields in JSON."""
    if as_json:
        print_json(
            **fields, layers=placement.layers, experts=placement.num_experts, ranks=placement.ranks,
            slots_per_rank=placement.slots_per_rank, slots=placement.slots, redundant=placement.redundant,
        )  # fmt: skip
    else:
        Console().print(summary_table(placement, title))
