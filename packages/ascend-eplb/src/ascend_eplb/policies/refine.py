# SPDX-License-Identifier: Apache-2.0
"""Swap refinement: hot ranks trade one slot each with cold ranks, in all layers at once.

Legend: B problems, R ranks, K slots per rank, P = R // 2 pairs of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray

__all__ = ["refine"]


def refine(ids_BRK: NDArray[Any], share_BRK: FloatArray, goal_B: FloatArray, rounds: int) -> None:
    """Swap slots between paired ranks while that lowers the hotter of the two. Both arrays change in place.

    Round t pairs the i-th hottest rank with the (i + t')-th coldest, where t' runs over small shifts, so that a pair
    that cannot trade meets another partner. A swap never puts an expert twice on a rank that had it not.

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
    total_BR = share_BRK.sum(axis=2)
    narrow_BRK = ids_BRK.astype(np.int32)
    idle_B = np.zeros(len(ids_BRK), dtype=np.int64)
    for turn in range(rounds):
        active = np.flatnonzero((total_BR.max(axis=1) > goal_B) & (idle_B < min(pairs, 8)))
        if not len(active):
            break
        order_AR = np.argsort(total_BR[active], axis=1)
        hot_AP = order_AR[:, : ranks - pairs - 1 : -1]
        cold_AP = np.roll(order_AR[:, :pairs], turn % pairs if turn % 2 else 0, axis=1)
        swapped_A = _trade(narrow_BRK, share_BRK, total_BR, (active, hot_AP, cold_AP))
        idle_B[active] = np.where(swapped_A, 0, idle_B[active] + 1)
    ids_BRK[...] = narrow_BRK


def _trade(
    ids_BRK: NDArray[Any],
    share_BRK: FloatArray,
    total_BR: FloatArray,
    pairing: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
) -> NDArray[np.bool_]:
    """Make the best swap of each pair that gains by one; bool `[A]`: whether a problem's hottest pair changed at
    all."""
    active, hot_AP, cold_AP = pairing
    slots = ids_BRK.shape[2]
    row_A1 = active[:, None]
    hot_ids, cold_ids = ids_BRK[row_A1, hot_AP], ids_BRK[row_A1, cold_AP]
    half_AP = (total_BR[row_A1, hot_AP] - total_BR[row_A1, cold_AP]) / 2
    scale_A11 = total_BR[row_A1, hot_AP[:, :1]][..., None]
    hot_key = ((share_BRK[row_A1, hot_AP] - half_AP[..., None]) / scale_A11).astype(np.float32)
    cold_key = (share_BRK[row_A1, cold_AP] / scale_A11).astype(np.float32)
    both = np.nonzero(hot_ids[..., :, None] == cold_ids[..., None, :])
    hot_key[both[0], both[1], both[2]], cold_key[both[0], both[1], both[3]] = np.inf, -np.inf
    miss = hot_key[..., :, None] - cold_key[..., None, :]
    best_AP = np.abs(miss, out=miss).reshape(*half_AP.shape, -1).argmin(axis=2)
    give_AP, take_AP = np.divmod(best_AP, slots)
    number_A1, pair_1P = np.arange(len(active))[:, None], np.arange(half_AP.shape[1])
    least_AP = np.abs(hot_key[number_A1, pair_1P, give_AP] - cold_key[number_A1, pair_1P, take_AP])
    row, pair = np.nonzero(half_AP / scale_A11[..., 0] - least_AP > 1e-6)
    layer, hot, cold = active[row], hot_AP[row, pair], cold_AP[row, pair]
    give, take = give_AP[row, pair], take_AP[row, pair]
    delta = share_BRK[layer, hot, give] - share_BRK[layer, cold, take]
    for array in (ids_BRK, share_BRK):
        array[layer, hot, give], array[layer, cold, take] = array[layer, cold, take], array[layer, hot, give]
    total_BR[layer, hot] -= delta
    total_BR[layer, cold] += delta
    swapped_A = np.zeros(len(active), dtype=bool)
    swapped_A[row] = True
    return swapped_A
