# SPDX-License-Identifier: Apache-2.0
"""What dynamic EPLB has done, in numbers: a log line for each rebalance, and the placement in force as a file. No vLLM, no torch.

Legend: M MoE layers, R ranks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ascend_eplb import Placement, save_placement

__all__ = ["Status", "log_dropped", "log_rebalance", "write_map"]

_logger = logging.getLogger("vllm_ascend")


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
        balancedness: of the placement in force for the last load that a plan was made from, averaged over layers; None before the first plan.
        predicted: of the placement after the last plan, for the same load.
        dropped: plans that moved nothing, by reason.
        failures: plans that failed.
        heat: tokens of each rank in each layer `[M][R]` in the last interval.
    """

    intervals: int = 0
    rebalances: int = 0
    moves: int = 0
    bytes_moved: int = 0
    background_seconds: float = 0.0
    waited_seconds: float = 0.0
    longest_wait_seconds: float = 0.0
    balancedness: float | None = None
    predicted: float | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    failures: int = 0
    heat: list[list[float]] = field(default_factory=list)

    def step_waited(self, seconds: float) -> None:
        """Count the wait of one step."""
        self.waited_seconds += seconds
        self.longest_wait_seconds = max(self.longest_wait_seconds, seconds)

    def count_dropped(self, reason: str) -> None:
        """Count a plan that moves nothing, by what its reason begins with."""
        kind = reason.partition(":")[0]
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        self.failures += kind == "failed"


def log_rebalance(status: Status, *, moves: int, layers: int, num_bytes: int, seconds: float, steps: int) -> None:
    """Say in one line what a rebalance has done."""
    before, after = status.balancedness or 0.0, status.predicted or 0.0
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
