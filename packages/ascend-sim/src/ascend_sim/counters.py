# SPDX-License-Identifier: Apache-2.0
"""What this process asked of the simulated NPU: calls per operator, floating-point operations, bytes per collective and group.

The figures depend on the program alone, not on the host: they serve tests and benchmarks as a measure of work, never of time.

    with counting() as work:
        model(tokens)
    print(work.delta.flops)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table

__all__ = [
    "Counting",
    "GraphCount",
    "OperatorCount",
    "Snapshot",
    "TrafficCount",
    "counting",
    "reset",
    "snapshot",
    "table",
]


@dataclass(frozen=True, slots=True)
class OperatorCount:
    """How often an operator ran, and the floating-point operations of its matrix products (2 per multiply-add)."""

    calls: int
    flops: int

    def __sub__(self, earlier: OperatorCount) -> OperatorCount:
        """What came after `earlier`."""
        return OperatorCount(self.calls - earlier.calls, self.flops - earlier.flops)


@dataclass(frozen=True, slots=True)
class TrafficCount:
    """How often this rank joined a collective, and the bytes it sent.

    The bytes are those of the collective's bandwidth-optimal algorithm, with n ranks and b the bytes of this rank's input: all-reduce
    2b(n-1)/n, all-gather b(n-1), reduce-scatter and all-to-all b(n-1)/n (all-to-all with splits: what goes to other ranks), broadcast and
    send b at the source, reduce and gather b at all but the destination, scatter b(n-1)/n at the source. Kernels that dispatch tokens to experts
    and combine what returns: the tokens, with their quantisation scales, that go to other ranks.
    """

    calls: int
    bytes: int

    def __sub__(self, earlier: TrafficCount) -> TrafficCount:
        """What came after `earlier`."""
        return TrafficCount(self.calls - earlier.calls, self.bytes - earlier.bytes)


@dataclass(frozen=True, slots=True)
class GraphCount:
    """What graphs (torch.npu.NPUGraph) did.

    Attributes:
        replays: graphs that the host launched.
        updates: operators of graphs to which the host gave new arguments.
        calls: calls of operators and collectives that replays made. They are among those of `Snapshot.operators` and `Snapshot.collectives`.
    """

    replays: int = 0
    updates: int = 0
    calls: int = 0

    def __sub__(self, earlier: GraphCount) -> GraphCount:
        """What came after `earlier`."""
        return GraphCount(self.replays - earlier.replays, self.updates - earlier.updates, self.calls - earlier.calls)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counters at one moment, or the difference of two moments.

    Attributes:
        operators: name without overload, such as ``aten::mm`` -> count.
        collectives: (name such as ``allreduce_``, description or name of the group) -> count.
        graphs: replays of graphs, updates of their operators, and the calls that replays made.
    """

    operators: Mapping[str, OperatorCount]
    collectives: Mapping[tuple[str, str], TrafficCount]
    graphs: GraphCount = GraphCount()

    @property
    def calls(self) -> int:
        """Operator calls in all."""
        return sum(count.calls for count in self.operators.values())

    @property
    def launches(self) -> int:
        """What the host launched: operators and collectives that it called itself, replays of graphs, and updates of operators in graphs."""
        called = self.calls + sum(count.calls for count in self.collectives.values())
        return called - self.graphs.calls + self.graphs.replays + self.graphs.updates

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products in all."""
        return sum(count.flops for count in self.operators.values())

    @property
    def bytes(self) -> int:
        """Bytes this rank sent in collectives in all."""
        return sum(count.bytes for count in self.collectives.values())

    def __sub__(self, earlier: Snapshot) -> Snapshot:
        """What happened between `earlier` and this snapshot; what did not happen is left out.

        Raises:
            ValueError: `earlier` is later, or the counters were reset in between.
        """
        no_calls, no_traffic = OperatorCount(0, 0), TrafficCount(0, 0)
        names = self.operators.keys() | earlier.operators.keys()
        keys = self.collectives.keys() | earlier.collectives.keys()
        operators = {
            name: self.operators.get(name, no_calls) - earlier.operators.get(name, no_calls) for name in sorted(names)
        }
        collectives = {
            key: self.collectives.get(key, no_traffic) - earlier.collectives.get(key, no_traffic)
            for key in sorted(keys)
        }
        if (
            min((count.calls for count in operators.values()), default=0) < 0
            or min((count.calls for count in collectives.values()), default=0) < 0
        ):
            raise ValueError("the snapshot that is subtracted must be the earlier one, with no reset() in between")
        return Snapshot(
            {name: count for name, count in operators.items() if count.calls},
            {key: count for key, count in collectives.items() if count.calls},
            self.graphs - earlier.graphs,
        )


class Counting:
    """What has happened since `counting` began; once its block ends, what happened in the block."""

    def __init__(self) -> None:
        """Begin now."""
        self._start = snapshot()
        self._end: Snapshot | None = None

    @property
    def delta(self) -> Snapshot:
        """The difference to the beginning."""
        return (self._end or snapshot()) - self._start

    def stop(self) -> None:
        """Count no further."""
        self._end = snapshot()


@contextlib.contextmanager
def counting() -> Iterator[Counting]:
    """Count what a block does: ``with counting() as work: ...``, then ``work.delta``."""
    work = Counting()
    try:
        yield work
    finally:
        work.stop()


def snapshot() -> Snapshot:
    """The counters of this process now.

    Raises:
        RuntimeError: the simulator does not run in this process.
    """
    operators, calls, flops = _ops().counts()
    collectives, groups, joined, sent = _ops().comm_counts()
    return Snapshot(
        {name: OperatorCount(*count) for name, *count in zip(operators, calls, flops, strict=True)},
        {
            (name, group): TrafficCount(*count)
            for name, group, *count in zip(collectives, groups, joined, sent, strict=True)
        },
        GraphCount(*_ops().graph_counts()),
    )


def reset() -> None:
    """Set the counters of this process to zero."""
    _ops().reset_counts()
    _ops().reset_comm_counts()
    _ops().reset_graph_counts()


def table(counts: Snapshot, *, title: str = "Work on the simulated NPU", rows: int = 20) -> Group:
    """What `rich.print` shows of a snapshot: operators by floating-point operations, then calls, and all collectives.

    Args:
        counts: a snapshot or a difference.
        title: of the table of operators.
        rows: most operators to list; the sum is over all of them.
    """
    operators = Table("operator", title=title, show_footer=True)
    operators.columns[0].footer = f"all {len(counts.operators)}"
    operators.add_column("calls", justify="right", footer=f"{counts.calls:,}")
    operators.add_column("GFLOP", justify="right", footer=f"{counts.flops / 1e9:,.3f}")
    ranked = sorted(counts.operators.items(), key=lambda item: (-item[1].flops, -item[1].calls, item[0]))
    for name, count in ranked[:rows]:
        operators.add_row(name, f"{count.calls:,}", f"{count.flops / 1e9:,.3f}" if count.flops else "")
    if not counts.collectives:
        return Group(operators)
    collectives = Table("collective", "group", title="Traffic of this rank", show_footer=True)
    collectives.columns[0].footer = "all"
    collectives.add_column(
        "calls", justify="right", footer=f"{sum(count.calls for count in counts.collectives.values()):,}"
    )
    collectives.add_column("bytes sent", justify="right", footer=f"{counts.bytes:,}")
    for (name, group), traffic in sorted(counts.collectives.items()):
        collectives.add_row(name.strip("_"), group, f"{traffic.calls:,}", f"{traffic.bytes:,}")
    return Group(operators, collectives)


def _ops() -> torch._ops._OpNamespace:
    """The simulator's own operators."""
    if not hasattr(torch.ops.ascend_sim, "counts"):
        raise RuntimeError(
            "the simulated NPU does not run in this process, so there are no counters: see `ascend-sim status`"
        )
    return torch.ops.ascend_sim
