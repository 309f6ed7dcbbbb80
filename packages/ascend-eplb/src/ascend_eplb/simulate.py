# SPDX-License-Identifier: Apache-2.0
"""Replay of recorded loads: plan on one window, score on the next, which the plan has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ascend_eplb.load import as_history, mean_load
from ascend_eplb.metrics import FloatArray, balancedness
from ascend_eplb.plan import default_placement, solve
from ascend_eplb.policies.base import Policy, Problem

__all__ = ["Score", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One step of a replay, averaged over the layers.

    Args:
        window: number of the window scored (1 is the first, window 0 having been planned on).
        kept: balancedness of the placement before any rebalancing (the initial one) in this window.
        planned: what the plan promised for the window it was made for.
        reached: its balancedness in this window.
        moved: slots that the plan moved, over all layers.
    """

    window: int
    kept: float
    planned: float
    reached: float
    moved: int


def simulate(
    history: ArrayLike,
    problem: Problem,
    policy: str | Policy = "balanced",
    *,
    window: int = 1,
    weigh: Callable[[FloatArray], FloatArray] = mean_load,
    advance: Callable[[], object] | None = None,
) -> list[Score]:
    """Plan on each window of `window` steps and score on the next.

    Args:
        history: loads `[T, L, E]`; at least two whole windows. Steps beyond the last whole window are left out.
        problem: everything but the load, which each window replaces; its `previous` is the placement at the start
            (`spread` where there is none).
        policy: as for `rebalance`.
        window: steps of a window.
        weigh: makes one load `[L, E]` to plan with from a window's steps `[T, L, E]`: `mean_load`, or `decayed_load` or
            `peak_load` with their second argument bound. Scores are always on the mean, which is what was routed.
        advance: called after every window, for progress bars.

    Raises:
        TypeError, ValueError: fewer than two windows, loads of another shape than the problem's, or as `Problem`.

    Complexity: the policy's, times T / window.

    Source: walk-forward validation of forecasts.
    """
    history_TLE = as_history(history)
    if window < 1 or history_TLE.shape[0] < 2 * window:
        steps = 2 * max(window, 1)
        raise ValueError(f"window={window} needs a history of at least {steps} steps, not {len(history_TLE)}")
    windows = len(history_TLE) // window
    parts = [history_TLE[index * window : (index + 1) * window] for index in range(windows)]
    start = problem.previous or default_placement(problem)
    current, scores = start, []
    for index in range(1, windows):
        plan = solve(replace(problem, load=weigh(parts[index - 1]), previous=current), policy)
        current, seen = plan.placement, mean_load(parts[index])
        scores.append(
            Score(
                window=index,
                kept=float(np.mean(balancedness(start, seen))),
                planned=plan.balancedness,
                reached=float(np.mean(balancedness(current, seen))),
                moved=plan.moved,
            )
        )
        if advance is not None:
            advance()
    return scores
