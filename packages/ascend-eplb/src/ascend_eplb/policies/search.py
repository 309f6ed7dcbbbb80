# SPDX-License-Identifier: Apache-2.0
"""Search over replica counts, for ranks of few slots: there the counts decide, and highest averages are not the best.

With two slots a rank, pairing heaviest with lightest is optimal for given counts, so the peak is known without packing.
`search_pair_counts` builds counts for several target peaks; `anneal_counts` is simulated annealing, for small problems.

Legend: B problems, E experts, S slots, R ranks, K slots per rank, A problems at hand, X = chains of all problems.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray
from ascend_eplb.policies.packing import difference_peaks, sorted_items

__all__ = ["anneal_counts", "pair_peaks", "search_pair_counts"]

Ids = NDArray[np.int64]
Floats = NDArray[np.floating]
# Aims (0 is the lower bound, 1 what highest averages reach) and weights to try first, then steps from the best so far.
_TRIALS = np.array(((0.0, 0.5), (0.15, 1.0), (0.45, 1.5), (0.5, 0.5), (0.6, 2.0)), dtype=np.float32)
_STEPS = np.array(
    ((0.08, 0.2), (-0.08, -0.2), (0.04, 0.0), (-0.04, 0.0), (0.0, 0.12), (0.0, -0.12), (0.02, 0.06), (-0.02, -0.06)),
    dtype=np.float32,
)
_LEAST = np.array((-0.02, 0.0), dtype=np.float32)
_DONE = 7e-4  # a peak within this part of the lower bound is good enough
_HIGH = 1 if sys.byteorder == "little" else 0  # the more significant half of a 64-bit key
_CHAINS, _ROUNDS, _HEAT = 16, 100, 0.04


def search_pair_counts(load_BE: FloatArray, count_BE: Ids, *, ranks: int, cap: int) -> Ids:
    """Counts `[B, E]` for two slots a rank, built for several peaks T and kept where they beat `count_BE`.

    With all shares at most T / 2 any pairing fits, but that takes too many slots. Each expert can save one by having a
    replica less, whose c - 1 larger shares then need light partners. The experts that save are those where this is
    cheapest: (share - T / 2) * (c - 1) ** a is least. T and a are searched for each problem by itself.

    Args:
        load_BE: loads.
        count_BE: highest-average counts, of 2 * `ranks` slots.
        ranks: R.
        cap: most replicas of an expert.

    Complexity: 13 rounds of O(B * S log S).
    """
    mean_B = load_BE.sum(axis=1) / ranks
    part_BE = (load_BE / np.where(mean_B > 0, mean_B, 1.0)[:, None]).astype(np.float32)
    best_BE, least_B = count_BE.copy(), pair_peaks(part_BE, count_BE)
    bound_B = np.maximum((part_BE / count_BE).max(axis=1), 1.0).astype(np.float32)
    room_B, found_B = least_B - bound_B, np.full(len(load_BE), np.inf, dtype=np.float32)
    place_B2 = np.zeros((len(load_BE), 2), dtype=np.float32)  # aim and weight of the best trial
    for turn, move_2 in enumerate((*_TRIALS, *_STEPS)):
        start_B2 = place_B2 if turn >= len(_TRIALS) else np.zeros_like(place_B2)
        trial_B2 = np.maximum(start_B2 + move_2, _LEAST)
        open_A = np.flatnonzero(least_B > bound_B * (1 + _DONE))
        if not len(open_A):
            break
        aim_A = bound_B[open_A] + room_B[open_A] * trial_B2[open_A, 0]
        count_AE = _counts_for(part_BE[open_A], aim_A / 2, trial_B2[open_A, 1], (2 * ranks, cap))
        valid = count_AE.sum(axis=1) == 2 * ranks
        open_A, count_AE = open_A[valid], count_AE[valid]
        if not len(open_A):
            continue
        peak_A = pair_peaks(part_BE[open_A], count_AE)
        nearer = peak_A < found_B[open_A]
        found_B[open_A[nearer]], place_B2[open_A[nearer]] = peak_A[nearer], trial_B2[open_A[nearer]]
        better = peak_A < least_B[open_A]
        least_B[open_A[better]], best_BE[open_A[better]] = peak_A[better], count_AE[better]
    return best_BE


def _counts_for(load_AE: Floats, half_A: Floats, weight_A: Floats, limits: tuple[int, int]) -> Ids:
    """Counts `[A, E]` for shares of about `half_A`; of another sum than the slots where that cannot be."""
    slots, cap = limits
    wanted_AE = np.minimum(np.maximum(np.ceil(load_AE / half_A[:, None]), 1), cap)
    fewer_AE = np.maximum(wanted_AE - 1, 1)
    excess_A = wanted_AE.sum(axis=1).astype(np.int64) - slots
    key_AE = (load_AE / fewer_AE - half_A[:, None]) * np.exp2(weight_A[:, None] * np.log2(fewer_AE))
    key_AE[wanted_AE < 2] = np.inf
    last_A1 = np.clip(excess_A - 1, 0, load_AE.shape[1] - 1)[:, None]
    most_A1 = np.take_along_axis(np.sort(key_AE, axis=1), last_A1, axis=1)
    most_A1[excess_A <= 0] = -np.inf
    count_AE = (wanted_AE - ((key_AE <= most_A1) & (wanted_AE > 1))).astype(np.int64)
    missing_A = slots - count_AE.sum(axis=1)
    for turn in range(max(int(missing_A.max()), 0)):  # slots left over go to the greatest shares
        needy = np.flatnonzero(missing_A > turn)
        share_NE = np.where(count_AE[needy] < cap, load_AE[needy] / count_AE[needy], -1.0)
        fullest = share_NE.argmax(axis=1)
        count_AE[needy, fullest] += share_NE[np.arange(len(needy)), fullest] >= 0
    return np.asarray(count_AE)


def pair_peaks(load_BE: NDArray[np.floating], count_BE: Ids) -> NDArray[np.floating]:
    """Peak rank load `[B]` of the best packing, two slots a rank, of replicas in these numbers. O(B * S log S).

    float32 loads are sorted with their counts in one 64-bit key, and give float32.
    """
    batch = len(load_BE)
    if load_BE.dtype == np.float32:
        key_BE2 = np.empty((*load_BE.shape, 2), dtype=np.uint32)
        share_BE = (load_BE / count_BE).astype(np.float32)
        key_BE2[..., _HIGH], key_BE2[..., 1 - _HIGH] = share_BE.view(np.uint32), count_BE
        key_BE = key_BE2.view(np.uint64)[..., 0]
        key_BE.sort(axis=1)
        share_X = key_BE2[..., _HIGH].ravel().view(np.float32)
        share_BS = np.repeat(share_X, key_BE2[..., 1 - _HIGH].ravel()).reshape(batch, -1)
    else:
        share_BS = np.sort(np.repeat((load_BE / count_BE).ravel(), count_BE.ravel()).reshape(batch, -1), axis=1)
    ranks = share_BS.shape[1] // 2
    return np.asarray((share_BS[:, :ranks] + share_BS[:, : ranks - 1 : -1]).max(axis=1))


def anneal_counts(load_BE: FloatArray, count_BE: Ids, *, ranks: int, cap: int) -> Ids:
    """Counts `[B, C, E]`, the best of each of C = 16 chains that start from `count_BE`, by simulated annealing of one
    replica's owner at a time.

    All chains of all problems are stepped together, with a fixed seed: the same input gives the same counts. A problem
    is valued by its peak after differencing (exact for two slots a rank), duplicates not looked at; which chain is best
    with duplicates apart is left to the caller.

    Complexity: 100 steps of O(X * S log S), X = 16 * B.
    """
    generator = np.random.default_rng(0)
    mean_B = load_BE.sum(axis=1) / ranks
    part_BE = (load_BE / np.where(mean_B > 0, mean_B, 1.0)[:, None]).astype(np.float32)
    part_XE, now_XE = (np.repeat(array, _CHAINS, axis=0) for array in (part_BE, count_BE))
    peak_X = _peaks(part_XE, now_XE, ranks)
    best_XE, least_X = now_XE.copy(), peak_X.copy()
    for step in range(_ROUNDS):
        heat = _HEAT * (1 - step / _ROUNDS) ** 2 + 1e-4
        trial_XE, valid_X = _with_one_moved(now_XE, cap, generator)
        trial_X = _peaks(part_XE, trial_XE, ranks)
        taken = valid_X & (trial_X < peak_X + heat * generator.exponential(size=len(peak_X)))
        now_XE[taken], peak_X[taken] = trial_XE[taken], trial_X[taken]
        better = peak_X < least_X
        best_XE[better], least_X[better] = now_XE[better], peak_X[better]
    return best_XE.reshape(len(load_BE), _CHAINS, -1)


def _with_one_moved(now_XE: Ids, cap: int, generator: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
    """The counts with a replica less of one expert and one more of another, both at random, and where that was
    possible."""
    row_X = np.arange(len(now_XE))
    giver_X = (generator.random(now_XE.shape) * (now_XE > 1)).argmax(axis=1)
    taker_X = (generator.random(now_XE.shape) * (now_XE < cap)).argmax(axis=1)
    valid_X = (now_XE[row_X, giver_X] > 1) & (now_XE[row_X, taker_X] < cap) & (giver_X != taker_X)
    trial_XE = now_XE.copy()
    trial_XE[row_X[valid_X], giver_X[valid_X]] -= 1
    trial_XE[row_X[valid_X], taker_X[valid_X]] += 1
    return trial_XE, valid_X


def _peaks(load_BE: Floats, count_BE: Ids, ranks: int) -> Floats:
    """Peak rank load `[B]` after packing replicas in these numbers."""
    if count_BE[0].sum() == 2 * ranks:
        return pair_peaks(load_BE, count_BE)
    return difference_peaks(sorted_items(load_BE, count_BE)[1], ranks)
