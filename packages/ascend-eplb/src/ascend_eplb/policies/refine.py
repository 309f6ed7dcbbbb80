# SPDX-License-Identifier: Apache-2.0
"""Swap refinement: hot ranks swap one slot each with cold ranks, in all layers at once.

Legend: B problems, R ranks, K slots per rank, P = R // 2 pairs of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray, sum_slots

__all__ = ["refine"]


def refine(ids_BRK: NDArray[Any], share_BRK: FloatArray, goal_B: FloatArray, rounds: int) -> None:
    """Swap slots between paired ranks while that lowers the hotter of the two. Both arrays change in place.

    Round t pairs the i-th hottest rank with the (i + t')-th coldest, where t' runs over small shifts, so that a rank
    that cannot swap with one partner meets another. A swap never puts an expert on a rank that holds it already.

    Args:
        ids_BRK: experts `[B, R, K]`.
        share_BRK: load of each slot.
        goal_B: `[B]` peak rank load at which a problem is done.
        rounds: most rounds.

    Complexity: O(rounds * B * S * K).
    """
    ranks = ids_BRK.shape[1]
    pairs = ranks // 2
    if not pairs:
        return
    total_BR = sum_slots(share_BRK)
    narrow_BRK, loads_BRK = ids_BRK.astype(np.int32), np.array(share_BRK, order="C")
    idle_B = np.zeros(len(ids_BRK), dtype=np.int64)
    for turn in range(rounds):
        active = np.flatnonzero((total_BR.max(axis=1) > goal_B) & (idle_B < min(pairs, 8)))
        if not len(active):
            break
        order_AR = np.argsort(total_BR[active], axis=1, kind="stable")
        hot_AP = order_AR[:, : ranks - pairs - 1 : -1]
        shift = turn % pairs if turn % 2 else 0
        cold_AP = order_AR[:, (np.arange(pairs) - shift) % pairs]
        swapped_A = _swap_best_slots(narrow_BRK, loads_BRK, total_BR, (active, hot_AP, cold_AP))
        idle_B[active] = np.where(swapped_A, 0, idle_B[active] + 1)
    ids_BRK[...], share_BRK[...] = narrow_BRK, loads_BRK


def _swap_best_slots(
    ids_BRK: NDArray[Any],
    share_BRK: FloatArray,
    total_BR: FloatArray,
    pairing: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
) -> NDArray[np.bool_]:
    """Make the best swap of each pair that gains by one; bool `[A]`: whether any pair of a problem did."""
    active, hot_AP, cold_AP = pairing
    ranks, slots = ids_BRK.shape[1:]
    first_A1 = active[:, None] * ranks
    hot_AP, cold_AP = first_A1 + hot_AP, first_A1 + cold_AP  # rows of [B * R, K]
    ids_XK, share_XK, total_X = ids_BRK.reshape(-1, slots), share_BRK.reshape(-1, slots), total_BR.reshape(-1)
    half_AP = (total_X[hot_AP] - total_X[cold_AP]) / 2
    scale_A1 = total_X[hot_AP[:, :1]]
    hot_key = ((share_XK[hot_AP] - half_AP[..., None]) / scale_A1[..., None]).astype(np.float32)
    cold_key = (share_XK[cold_AP] / scale_A1[..., None]).astype(np.float32)
    both = np.flatnonzero(ids_XK[hot_AP][..., :, None] == ids_XK[cold_AP][..., None, :])
    pair_X, place_X = np.divmod(both, slots * slots)
    hot_key.reshape(-1, slots)[pair_X, place_X // slots] = np.inf
    cold_key.reshape(-1, slots)[pair_X, place_X % slots] = -np.inf
    miss = hot_key[..., :, None] - cold_key[..., None, :]
    miss_QW = np.abs(miss, out=miss).reshape(half_AP.size, -1)  # Q = A * P pairs
    best_Q = miss_QW.argmin(axis=1)
    least_Q = miss_QW[np.arange(len(best_Q)), best_Q]
    pair_Y = np.flatnonzero((half_AP / scale_A1).ravel() - least_Q > 1e-6)
    give_Y, take_Y = np.divmod(best_Q[pair_Y], slots)
    hot_Y, cold_Y = hot_AP.ravel()[pair_Y], cold_AP.ravel()[pair_Y]
    delta_Y = share_XK[hot_Y, give_Y] - share_XK[cold_Y, take_Y]
    for array in (ids_XK, share_XK):
        array[hot_Y, give_Y], array[cold_Y, take_Y] = array[cold_Y, take_Y], array[hot_Y, give_Y]
    total_X[hot_Y] -= delta_Y
    total_X[cold_Y] += delta_Y
    swapped_A = np.zeros(len(active), dtype=bool)
    swapped_A[pair_Y // half_AP.shape[1]] = True
    return swapped_A
