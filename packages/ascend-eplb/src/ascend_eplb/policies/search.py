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
_NEAR = 0.03  # counts made for a peak may well end this far below it
_CHAINS, _STEPS, _HEAT = 16, 100, 0.15


def ladder_counts(load_BE: FloatArray, count_BE: Ids, *, ranks: int, cap: int) -> Ids:
    """Counts `[B, E]` for two slots a rank, built for several peaks T and kept where they beat `count_BE`.

    With all shares at most T / 2 any pairing fits, but that takes too many slots. Each expert can save one by having a
    replica less, whose c - 1 larger shares then need light partners. The experts that save are those where this is
    cheapest: (share - T / 2) * (c - 1) ** a is least, for two values of a. Problems already well below T are left alone.

    Complexity: at most 18 rounds of O(B * S log S).
    """
    slots, experts = 2 * ranks, load_BE.shape[1]
    best_BE, peak_B = count_BE.copy(), _rank_sums(load_BE, count_BE, ranks).max(axis=1)
    mean_B = load_BE.sum(axis=1) / ranks
    for aim in _AIMS:
        open_A = np.flatnonzero(peak_B > (aim - _NEAR) * mean_B)
        if not len(open_A):
            break
        load_AE, half_A1 = load_BE[open_A], aim * mean_B[open_A, None] / 2
        wanted_AE = np.clip(np.ceil(load_AE / half_A1 - 1e-12), 1, cap).astype(np.int64)
        fewer_AE = np.maximum(wanted_AE - 1, 1)
        over_AE = np.where(wanted_AE > 1, load_AE / fewer_AE - half_A1, np.inf)
        excess_A1 = wanted_AE.sum(axis=1, keepdims=True) - slots
        last_A1 = np.clip(excess_A1 - 1, 0, experts - 1)
        for weight in _WEIGHTS:
            key_AE = over_AE * (np.arange(cap + 1.0) ** weight)[fewer_AE]
            most_A1 = np.take_along_axis(np.sort(key_AE, axis=1), last_A1, axis=1)
            trial_AE = wanted_AE - ((key_AE <= most_A1) & (excess_A1 > 0) & (wanted_AE > 1))
            filled_A = _fill_up(load_AE, trial_AE, slots, cap)
            if not filled_A.any():
                continue
            found_A = np.full(len(open_A), np.inf)
            found_A[filled_A] = _rank_sums(load_AE[filled_A], trial_AE[filled_A], ranks).max(axis=1)
            better_A = found_A < peak_B[open_A]
            best_BE[open_A[better_A]], peak_B[open_A[better_A]] = trial_AE[better_A], found_A[better_A]
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
    batch = len(load_BE)
    if count_BE[0].sum() == 2 * ranks:
        share_BS = np.sort(np.repeat((load_BE / count_BE).ravel(), count_BE.ravel()).reshape(batch, -1), axis=1)
        return np.asarray(share_BS[:, :ranks] + share_BS[:, : ranks - 1 : -1])
    expert_BS, share_BS = sorted_items(load_BE, count_BE)
    return np.asarray(shares(load_BE, difference(expert_BS, share_BS, ranks)).sum(axis=2))
