# SPDX-License-Identifier: Apache-2.0
"""The order in which processes joined collectives, from the logs that ASCEND_SIM_COLLECTIVES=FOLDER asks for, and whether it can work.

Ranks wait for each other for ever when two of them join the collectives of their groups in different orders. That may go unnoticed, where
the order depends on what a rank has to do; so compare the logs of a run, of one that ended or of one that hangs:

    for disagreement in disagreements(read_logs(folder)):
        print(disagreement)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise, zip_longest
from pathlib import Path

__all__ = ["Call", "disagreements", "read_logs"]

_MESSAGES = ("send", "recv_")  # between two ranks: the others of the group have no part in them


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a collective, or of a kernel that communicates, by one process.

    Args:
        op: its name, such as ``allreduce_`` or ``npu_moe_distribute_dispatch_v2``.
        group: the process group's name, equal on all of its ranks.
        about: the process group's description.
        rank: of this process in the group.
        size: ranks of the group.
        device: "npu" or "cpu"; "" for a kernel.
        dtype: of the first tensor; "" for a kernel.
        numbers: elements of the first tensor; None where ranks may differ in it.
        peer: the other rank of a message, in the group.
    """

    op: str
    group: str
    about: str = ""
    rank: int
    size: int
    device: str = ""
    dtype: str = ""
    numbers: int | None = None
    peer: int | None = None

    def __str__(self) -> str:
        """For a message: what was called, over which group, with what."""
        named = "" if self.about in ("", "undefined") else f" {self.about}"
        operand = f" of {self.numbers} {self.dtype}" if self.numbers is not None else ""
        return f"{self.op}{operand} over group {self.group}{named}"


def read_logs(folder: str | Path) -> dict[str, list[Call]]:
    """The calls of each process that wrote a log into `folder`, by the file's name without its ending. A last line that was cut off is left out.

    Raises:
        OSError: the folder or a file cannot be read.
        ValueError: a line that is no call.
    """
    logs = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            logs[path.stem] = [Call(**json.loads(line)) for line in lines]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no log of collectives: {error}") from error
    return logs


def disagreements(logs: Mapping[str, Sequence[Call]]) -> list[str]:
    """What keeps the processes from joining their collectives together; empty where they can.

    The ranks of a group must call equal collectives on it, in equal order, with equal amounts of data; and there must be an order of all
    collectives of all groups that fits every process.

    Args:
        logs: process -> its calls, in order. All processes of the groups, from the beginning.
    """
    calls = {process: [call for call in log if call.op not in _MESSAGES] for process, log in logs.items()}
    found = [text for group in _groups(calls).values() for text in _within(group)]
    return found or list(_between(calls))


def _groups(logs: Mapping[str, Sequence[Call]]) -> dict[str, dict[str, list[Call]]]:
    """Group -> process -> its calls on that group."""
    groups: dict[str, dict[str, list[Call]]] = {}
    for process, log in logs.items():
        for call in log:
            groups.setdefault(call.group, {}).setdefault(process, []).append(call)
    return groups


def _within(group: Mapping[str, Sequence[Call]]) -> Iterator[str]:
    """The first difference between the processes of one group."""
    first = next(iter(group.values()))[0]
    if len(group) != first.size:
        yield f"of the {first.size} ranks of group {first.group} only {len(group)} joined it: {first} in {', '.join(group)}"
        return
    for index, calls in enumerate(zip_longest(*group.values())):
        if len({call and (call.op, call.device, call.dtype, call.numbers) for call in calls}) > 1:
            each = "; ".join(f"{process}: {call or 'nothing more'}" for process, call in zip(group, calls, strict=True))
            yield f"call {index} on group {first.group} differs: {each}"
            return


def _between(logs: Mapping[str, Sequence[Call]]) -> Iterator[str]:
    """A circle of collectives that wait for each other, where every group agrees within itself."""
    before: dict[tuple[str, int], set[tuple[str, int]]] = {}
    text: dict[tuple[str, int], str] = {}
    for log in logs.values():
        calls: dict[str, int] = {}
        joined = []
        for call in log:
            index = calls[call.group] = calls.get(call.group, -1) + 1
            joined.append((call.group, index))
            text[joined[-1]] = f"call {index}, {call}"
        for earlier, later in pairwise(joined):
            before.setdefault(later, set()).add(earlier)
    try:
        TopologicalSorter(before).prepare()
    except CycleError as error:
        yield "these wait for each other, each for the next: " + "; ".join(
            text[node] for node in reversed(error.args[1])
        )
