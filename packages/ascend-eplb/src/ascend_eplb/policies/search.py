# SPDX-License-Identifier: Apache-2.0
"""Search over replica counts, for ranks of few slots: there the counts decide, and highest averages are not the best.

With two slots a rank, pairing heaviest with lightest is optimal for given counts, so the peak is known without packing.
`ladder_counts` builds counts for a peak that one aims at; `anneal_counts` walks at random and is for small problems.

Legend: B problems, E experts, S slots, R ranks, K slots per rank, X = chains of all problems.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray
from ascend_eplb.policies.packing import difference, shares, sorted_items

__all__ = ["anneal_counts", "ladder_counts"]

Ids = NDArray[np.int64]
_AIMS = 1.0 + 0.01 * np.arange(9)
_WEIGHTS = (1.25, 1.75)
_CHAINS, _STEPS, _HEAT = 16, 100, 0.15


def ladder_counts(load_BE: FloatArray, count_BE: Ids, *, ranks: int, cap: int) -> Ids:
    """Counts `[B, E]` for two slots a rank, built for several peaks T and kept where they beat `count_BE`.

    With all shares at most T / 2 any pairing fits, but that takes too many slots. Each expert can save one by having a
    replica less, whose c - 1 larger shares then need light partners. The experts that save are those where this is
    cheapest: (share - T / 2) * (c - 1) ** a is least, for two values of a.

    Complexity: 18 rounds of O(B * S log S).
    """
    batch, experts = load_BE.shape
    slots = 2 * ranks
    best_BE, peak_B = count_BE.copy(), _rank_sums(load_BE, count_BE, ranks).max(axis=1)
    mean_B1 = load_BE.sum(axis=1, keepdims=True) / ranks
    half_unit_B1 = np.where(mean_B1 > 0, mean_B1, 1.0) / 2
    number_BE = np.broadcast_to(np.arange(experts), (batch, experts))
    for aim in _AIMS:
        wanted_BE = np.clip(np.ceil(load_BE / (aim * half_unit_B1) - 1e-12), 1, cap).astype(np.int64)
        excess_B = wanted_BE.sum(axis=1) - slots
        fewer_BE = np.maximum(wanted_BE - 1, 1)
        over_BE = load_BE / fewer_BE - aim * half_unit_B1
        for weight in _WEIGHTS:
            key_BE = np.where(wanted_BE > 1, over_BE * fewer_BE**weight, np.inf)
            order_BE = np.argsort(key_BE, axis=1, kind="stable")
            turn_BE = np.empty_like(order_BE)
            np.put_along_axis(turn_BE, order_BE, number_BE, axis=1)
            trial_BE = wanted_BE - ((turn_BE < excess_B[:, None]) & (wanted_BE > 1))
            filled = _fill_up(load_BE, trial_BE, slots, cap)
            if not filled.any():
                continue
            found_B = np.full(batch, np.inf)
            found_B[filled] = _rank_sums(load_BE[filled], trial_BE[filled], ranks).max(axis=1)
            better = found_B < peak_B
            best_BE[better], peak_B[better] = trial_BE[better], found_B[better]
    return best_BE


def anneal_counts(load_BE: FloatArray, count_BE: Ids, *, ranks: int, cap: int) -> Ids:
    """Counts `[B, E]` at least as good as `count_BE`, by simulated annealing of one replica's owner at a time.

    Some chains a problem, all stepped together, with a fixed seed: the same input gives the same counts. A problem is
    valued by its peak after differencing (exact for two slots a rank), duplicates not looked at.

    Complexity: 100 steps of O(X * S log S), X = 16 * B.
    """
    generator = np.random.default_rng(0)
    batch = len(load_BE)
    load_XE, now_XE = np.repeat(load_BE, _CHAINS, axis=0), np.repeat(count_BE, _CHAINS, axis=0)
    row_X = np.arange(len(load_XE))
    mean_X = load_XE.sum(axis=1) / ranks
    mean_X = np.where(mean_X > 0, mean_X, 1.0)
    peak_X = _rank_sums(load_XE, now_XE, ranks).max(axis=1) / mean_X
    best_XE, least_X = now_XE.copy(), peak_X.copy()
    for step in range(_STEPS):
        heat = _HEAT * (1 - step / _STEPS) ** 2 + 1e-4
        giver_X = (generator.random(now_XE.shape) * (now_XE > 1)).argmax(axis=1)
        taker_X = (generator.random(now_XE.shape) * (now_XE < cap)).argmax(axis=1)
        valid = (now_XE[row_X, giver_X] > 1) & (now_XE[row_X, taker_X] < cap) & (giver_X != taker_X)
        trial_XE = now_XE.copy()
        trial_XE[row_X[valid], giver_X[valid]] -= 1
        trial_XE[row_X[valid], taker_X[valid]] += 1
        trial_X = _rank_sums(load_XE, trial_XE, ranks).max(axis=1) / mean_X
        taken = valid & (trial_X < peak_X + heat * generator.exponential(size=len(row_X)))
        now_XE[taken], peak_X[taken] = trial_XE[taken], trial_X[taken]
        better = peak_X < least_X
        best_XE[better], least_X[better] = now_XE[better], peak_X[better]
    winner_B = least_X.reshape(batch, _CHAINS).argmin(axis=1) + np.arange(batch) * _CHAINS
    return np.asarray(best_XE[winner_B])


def _fill_up(load_BE: FloatArray, count_BE: Ids, slots: int, cap: int) -> NDArray[np.bool_]:
    """Give slots left over to the greatest shares, in place; whether each problem now uses exactly `slots`."""
    missing_B = slots - count_BE.sum(axis=1)
    for turn in range(max(int(missing_B.max()), 0)):
        needy = np.flatnonzero(missing_B > turn)
        share_AE = np.where(count_BE[needy] < cap, load_BE[needy] / count_BE[needy], -1.0)
        count_BE[needy, share_AE.argmax(axis=1)] += 1
    return np.asarray((count_BE.sum(axis=1) == slots) & (count_BE.max(axis=1) <= cap))


def _rank_sums(load_BE: FloatArray, count_BE: Ids, ranks: int) -> FloatArray:
    """Rank loads `[B, R]` after packing replicas in these numbers."""
    expert_BS, share_BS = sorted_items(load_BE, count_BE)
    if expert_BS.shape[1] == 2 * ranks:
        return np.asarray(share_BS[:, :ranks] + share_BS[:, : ranks - 1 : -1])
    return np.asarray(shares(load_BE, difference(expert_BS, share_BS, ranks)).sum(axis=2))
