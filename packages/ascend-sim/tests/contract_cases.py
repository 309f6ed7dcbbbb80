# SPDX-License-Identifier: Apache-2.0
"""Calls that break one rule of a contract, and calls at its edge. Each `contract_*.py` beside this file has those of a family in `CASES`, by id."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Call = Callable[..., object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Calls that break one rule and no other, and calls that just keep it.

    Args:
        breaks: refused with the rule's id.
        edges: pass. Of a rule about the chip: run on the chip for which the rule does not hold.
        break_ranks, edge_ranks: in how many processes they run at once (`contract_worker.py`). With more than one each call is given its `Group`.
    """

    breaks: Sequence[Call]
    edges: Sequence[Call]
    break_ranks: int = 1
    edge_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Group:
    """What a call between processes is given: the name of their HCCL communicator, that of one of this rank alone, and the place in the first."""

    name: str
    alone: str
    rank: int
    world: int


def case(breaks: Call, edge: Call, *more_edges: Call) -> Case:
    """The usual case: one call that breaks the rule, and those at its edge."""
    return Case(breaks=[breaks], edges=[edge, *more_edges])


def between(breaks: Call, edge: Call, *more_edges: Call, break_ranks: int = 2) -> Case:
    """The usual case of a collective operator, in two processes."""
    return Case(breaks=[breaks], edges=[edge, *more_edges], break_ranks=break_ranks, edge_ranks=2)


def all_cases() -> dict[str, Case]:
    """The cases of all families."""
    found: dict[str, Case] = {}
    for path in sorted(Path(__file__).parent.glob("contract_*.py")):
        cases = getattr(importlib.import_module(path.stem), "CASES", {})
        if twice := found.keys() & cases.keys():
            raise ValueError(f"{path.name} has cases of rules that another file has: {', '.join(sorted(twice))}")
        found |= cases
    return found
