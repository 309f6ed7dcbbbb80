# SPDX-License-Identifier: Apache-2.0
"""What dynamic EPLB has done, in numbers: a log line for each rebalance, and the placement in force as a file. No vLLM, no torch.

Legend: M MoE layers, R ranks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
from ascend_eplb import Placement, save_placement
from numpy.typing import NDArray

from vllm_ascend.eplb.writer import WriterThread

__all__ = ["MapWriter", "Status", "cells", "log_dropped", "log_rebalance", "write_map"]

_logger = logging.getLogger("vllm.vllm_ascend")
_MOST_CELLS = 16  # of a heat map, in each direction
_SECONDS_TO_WRITE = 1.5  # at the end: vLLM ends a worker that takes more than five seconds in all


@dataclass(slots=True, kw_only=True)
class Status:
    """Since the engine started.

    Attributes:
        intervals: of load that were summed over ranks.
        rebalances: that were completed.
        moves: slots that got new weights.
        bytes_moved: over all ranks.
        background_seconds: from the first transfer of a rebalance to the last change, summed up.
        waited_seconds: that steps of this rank waited, summed up.
        longest_wait_seconds: of one step.
        balancedness: of the placement in force for the load of the last interval, averaged over layers; None before the first.
        planned_from: of the placement in force for the load that the last plan was made from; None before the first plan.
        predicted: of the placement after the last plan, for the same load.
        dropped: plans that moved nothing, by reason.
        failures: plans that failed.
        heat: tokens of each rank in each layer `[M][R]` in the last interval.
        changes: how often one of these has changed that is not of every step.
    """

    intervals: int = 0
    rebalances: int = 0
    moves: int = 0
    bytes_moved: int = 0
    background_seconds: float = 0.0
    waited_seconds: float = 0.0
    longest_wait_seconds: float = 0.0
    balancedness: float | None = None
    planned_from: float | None = None
    predicted: float | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    failures: int = 0
    heat: list[list[float]] = field(default_factory=list)
    changes: int = 0

    def step_waited(self, seconds: float) -> None:
        """Count the wait of one step."""
        self.waited_seconds += seconds
        self.longest_wait_seconds = max(self.longest_wait_seconds, seconds)

    def observed(self, loads: NDArray[np.float64]) -> None:
        """Take over the tokens of an interval `[M, R]`. Runs in the planner's thread."""
        fullest = loads.max(axis=1)
        with_load = fullest > 0
        if with_load.any():
            self.balancedness = float((loads.mean(axis=1)[with_load] / fullest[with_load]).mean())
        self.heat = loads.tolist()
        self.changes += 1

    def count_dropped(self, reason: str) -> None:
        """Count a plan that moves nothing, by what its reason begins with."""
        kind = reason.partition(":")[0]
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        self.failures += kind == "failed"


def log_rebalance(status: Status, *, moves: int, layers: int, num_bytes: int, seconds: float, steps: int) -> None:
    """Say in one line what a rebalance has done."""
    before, after = status.planned_from or 0.0, status.predicted or 0.0
    _logger.info(
        "experts rebalanced: %d slots in %d layers, %.1f MB over all ranks, in %.2f s beside %d steps; balancedness %.3f, predicted %.3f; steps have "
        "waited %.1f ms so far, at most %.2f ms",
        moves, layers, num_bytes / 2**20, seconds, steps, before, after,
        status.waited_seconds * 1e3, status.longest_wait_seconds * 1e3,
    )  # fmt: skip


def log_dropped(reason: str, before: float, after: float) -> None:
    """Say why a plan moves nothing."""
    level = logging.WARNING if reason.startswith("failed") else logging.INFO
    _logger.log(level, "no expert moves: %s (balancedness %.3f, planned %.3f)", reason, before, after)


def write_map(placed: Placement, path: str) -> None:
    """Write the placement in force, in place of the file; what goes wrong is logged."""
    try:
        save_placement(placed, path)
    except OSError as error:
        _logger.error("the placement of the experts cannot be written to %r: %s", path, error)


class MapWriter(WriterThread[Placement]):
    """Writes the placement in force to a file, which is replaced as a whole each time. Of placements that wait, the last one is written.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        """Start the thread."""
        super().__init__(path, name="expert map", what="placements of the experts")

    def close(self) -> None:
        """Write what waits, and end the thread; what is not written within 1.5 seconds is lost, which the log says."""
        self.finish(_SECONDS_TO_WRITE)

    def not_written(self, seconds: float) -> None:
        """See `WriterThread`."""
        _logger.error("the placement of the experts was not written to %r within %g seconds", self._path, seconds)

    def write(self, entries: list[Placement]) -> None:
        """See `WriterThread`."""
        if entries:
            write_map(entries[-1], self._path)


def cells(heat: list[list[float]]) -> list[tuple[str, str, float]]:
    """A heat map of at most 16 x 16 cells.

    Args:
        heat: tokens of each rank in each layer `[M][R]`.

    Returns:
        (layers, ranks, load) of each cell: "4-7" or "4", and the largest load of a rank / mean of all ranks among them. Layers without load have none.
    """
    loads = np.asarray(heat, dtype=np.float64)
    if not loads.size:
        return []
    means = loads.mean(axis=1, keepdims=True)
    relative = np.divide(loads, means, out=np.zeros_like(loads), where=means > 0)
    found = []
    for layers in np.array_split(np.arange(len(loads)), min(_MOST_CELLS, len(loads))):
        for ranks in np.array_split(np.arange(loads.shape[1]), min(_MOST_CELLS, loads.shape[1])):
            found.append((_span(layers), _span(ranks), round(float(relative[np.ix_(layers, ranks)].max()), 4)))
    return found


def _span(numbers: NDArray[np.int64]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
