# SPDX-License-Identifier: Apache-2.0
"""Loads: recorded counts of tokens, and one load to plan with from several steps.

Legend: T steps, L layers, E logical experts, R ranks, K slots per rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ascend_eplb.metrics import FloatArray, as_load, checked_numbers
from ascend_eplb.placement import Placement

__all__ = [
    "PHASES",
    "LoadWindow",
    "as_history",
    "decayed_load",
    "logical_load",
    "mean_load",
    "merge_ranks",
    "peak_load",
]

PHASES = ("prefill", "decode")


def as_history(history: ArrayLike) -> FloatArray:
    """Check loads over time and return them as float64 `[T, L, E]`; `[L, E]` is one step.

    Raises:
        TypeError: not numbers.
        ValueError: wrong axes, or a value that is NaN, negative or above 1e30 (named by step, layer and expert).

    Complexity: O(T * L * E).
    """
    return checked_numbers(history, "history", ("step", "layer", "expert"))


def mean_load(history: ArrayLike) -> FloatArray:
    """float64 `[L, E]`: the mean over the steps of `[T, L, E]`. Errors as `as_history`. O(T * L * E).

    Source: the definition.
    """
    return np.asarray(as_history(history).mean(axis=0))


def decayed_load(history: ArrayLike, half_life: float) -> FloatArray:
    """float64 `[L, E]`: the mean over the steps, a step counting half as much as one `half_life` steps later.

    Raises:
        ValueError: `half_life` is not positive, or as `as_history`.

    Complexity: O(T * L * E).

    Source: exponential smoothing (Brown, 1959), weights adding up to 1.
    """
    if not half_life > 0:
        raise ValueError(f"half_life={half_life} must be positive")
    history_TLE = as_history(history)
    age_T = np.arange(history_TLE.shape[0])[::-1]
    weight_T = np.exp2(-age_T / half_life)
    return np.asarray(np.tensordot(weight_T / weight_T.sum(), history_TLE, axes=1))


def peak_load(history: ArrayLike, risk: float = 1.0) -> FloatArray:
    """float64 `[L, E]`: mean + `risk` standard deviations over the steps, for experts whose load comes in bursts.

    Raises:
        ValueError: `risk` is negative, or as `as_history`.

    Complexity: O(T * L * E).

    Source: mean and deviation as a margin for peaks, as in stochastic bin packing.
    """
    if not risk >= 0:
        raise ValueError(f"risk={risk} must not be negative")
    history_TLE = as_history(history)
    return np.asarray(history_TLE.mean(axis=0) + risk * history_TLE.std(axis=0))


def merge_ranks(counts: Iterable[ArrayLike]) -> FloatArray:
    """float64 `[L, R, K]`: the physical counts `[L, K]` that each rank keeps, stacked in rank order.

    Raises:
        ValueError: no rank, or ranks that differ in shape.

    Complexity: O(R * L * K).
    Source: the definition.
    """
    parts = [np.asarray(part, dtype=np.float64) for part in counts]
    if not parts:
        raise ValueError("counts holds no rank")
    for rank, part in enumerate(parts):
        if part.ndim != 2 or part.shape != parts[0].shape:
            raise ValueError(
                f"counts of rank {rank} have shape {part.shape}; [layers, slots] = {parts[0].shape} expected"
            )
    return np.stack(parts, axis=1)


def logical_load(placement: Placement, physical: ArrayLike) -> FloatArray:
    """float64 `[L, E]`: counts per logical expert from counts per physical slot `[L, R, K]` or `[L, S]`.

    Raises:
        ValueError: not a count for each slot of the placement, or as `as_load`.

    Complexity: O(L * S).

    Source: the definition.
    """
    counts_LS = np.asarray(physical, dtype=np.float64)
    shape = placement.physical_to_logical.shape
    if counts_LS.shape not in (shape, (placement.layers, placement.slots)):
        raise ValueError(f"physical counts of shape {counts_LS.shape} do not fit a placement of shape {shape}")
    keys = placement.physical_to_logical + np.arange(placement.layers)[:, None, None] * placement.num_experts
    total = np.bincount(keys.ravel(), counts_LS.ravel(), placement.layers * placement.num_experts)
    return as_load(total.reshape(placement.layers, placement.num_experts))


@dataclass(slots=True, kw_only=True, eq=False)
class LoadWindow:
    """The last `capacity` steps of logical loads, kept per phase.

    Args:
        layers: L.
        num_experts: E.
        capacity: steps kept per phase; the oldest is dropped when one more comes.

    Raises:
        ValueError: `capacity` < 1, or as `push` and `history` say.
    """

    layers: int
    num_experts: int
    capacity: int
    _steps: dict[str, deque[tuple[int, FloatArray]]] = field(init=False, repr=False)
    _pushed: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        """Create an empty window for each phase."""
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity} must be at least 1")
        self._steps = {phase: deque(maxlen=self.capacity) for phase in PHASES}

    def push(self, load: ArrayLike, phase: str = "decode") -> None:
        """Add one step's load `[L, E]` of the phase "prefill" or "decode"; the array is copied. O(L * E).

        Raises:
            TypeError, ValueError: another phase, or no load of this shape (see `as_load`).
        """
        steps = self._phase(phase)
        steps.append((self._pushed, as_load(load, num_experts=self.num_experts, layers=self.layers)))
        self._pushed += 1

    def history(self, phase: str = "all") -> FloatArray:
        """float64 `[T, L, E]`: the steps kept of one phase, or of "all", in the order in which they were pushed.

        Use `mean_load`, `decayed_load` or `peak_load` on it. T is 0 where nothing was pushed. O(T * L * E).

        Raises:
            ValueError: another phase.
        """
        phases = PHASES if phase == "all" else (phase,)
        steps = sorted((step for name in phases for step in self._phase(name)), key=lambda step: step[0])
        return np.array([load for _, load in steps]).reshape(len(steps), self.layers, self.num_experts)

    def clear(self) -> None:
        """Forget all steps. O(1)."""
        for steps in self._steps.values():
            steps.clear()

    def _phase(self, phase: str) -> deque[tuple[int, FloatArray]]:
        if phase not in self._steps:
            raise ValueError(f"phase={phase!r} is not one of {', '.join(PHASES)}")
        return self._steps[phase]
