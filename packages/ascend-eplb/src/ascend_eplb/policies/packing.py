# SPDX-License-Identifier: Apache-2.0
"""Replica counts and packing, vectorised over independent problems (layers, or layers x nodes).

Legend: B problems, E experts, S items (replicas), R ranks, K = S / R slots per rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray

__all__ = ["capped_counts", "difference", "longest_first", "shares", "sorted_items"]

Ids = NDArray[np.int64]


def capped_counts(load_BE: FloatArray, slots: int, cap: int) -> Ids:
    """Replicas `[B, E]` of each expert: one, then each further slot to the greatest load per replica below `cap`.

    This minimises the greatest load per replica. O((S - E) * B * E).
    """
    batch, experts = load_BE.shape
    count_BE = np.ones((batch, experts), dtype=np.int64)
    share_BE = load_BE.copy() if cap > 1 else load_BE
    flat_load, flat_count, flat_share = load_BE.ravel(), count_BE.ravel(), share_BE.ravel()
    base_B = np.arange(batch) * experts
    for _ in range(slots - experts):
        index_B = share_BE.argmax(axis=1) + base_B
        more_B = flat_count[index_B] + 1
        flat_count[index_B] = more_B
        flat_share[index_B] = np.where(more_B < cap, flat_load[index_B] / more_B, -1.0)
    return count_BE


def shares(load_BE: FloatArray, ids_BRK: NDArray[Any]) -> FloatArray:
    """float64 `[B, R, K]`: the load of each slot, replicas of an expert sharing evenly. O(B * S)."""
    batch, experts = load_BE.shape
    keys = ids_BRK.reshape(batch, -1) + np.arange(batch)[:, None] * experts
    count = np.bincount(keys.ravel(), minlength=batch * experts)
    return np.asarray((load_BE.ravel() / np.maximum(count, 1))[keys].reshape(ids_BRK.shape))


def sorted_items(load_BE: FloatArray, count_BE: Ids) -> tuple[Ids, FloatArray]:
    """All replicas, heaviest first, those of one expert side by side: expert and share of each, `[B, S]`."""
    batch = len(load_BE)
    share_BE = load_BE / count_BE
    order_BE = np.argsort(-share_BE, axis=1, kind="stable")
    repeats = np.take_along_axis(count_BE, order_BE, axis=1).ravel()
    expert_BS = np.repeat(order_BE.ravel(), repeats).reshape(batch, -1)
    return expert_BS, np.take_along_axis(share_BE, expert_BS, axis=1)


def difference(expert_BS: Ids, share_BS: FloatArray, ranks: int) -> Ids:
    """Balanced largest-first differencing (Michiels et al., 2003): experts `[B, R, K]`, duplicates possible.

    The sorted items form K blocks of R, each a tuple of partial rank sums. The two tuples of widest spread are merged,
    heaviest sum with lightest, until one is left. Pairs (K = 2) are so packed optimally. O(K * B * S + K * B * R log
    R).
    """
    batch, slots = expert_BS.shape
    blocks = slots // ranks
    sums_BKR = share_BS.reshape(batch, blocks, ranks).copy()
    place_BKR = np.broadcast_to(np.arange(ranks), (batch, blocks, ranks)).copy()
    cluster_BK = np.broadcast_to(np.arange(blocks), (batch, blocks)).copy()
    width_BK = sums_BKR.max(axis=2) - sums_BKR.min(axis=2)
    row_B = np.arange(batch)
    number_BR = np.broadcast_to(np.arange(ranks), (batch, ranks))
    for _ in range(blocks - 1):
        first_B = width_BK.argmax(axis=1)
        width_BK[row_B, first_B] = -1.0
        second_B = width_BK.argmax(axis=1)
        width_BK[row_B, second_B] = -2.0
        up_BR = np.argsort(sums_BKR[row_B, first_B], axis=1, kind="stable")
        down_BR = np.argsort(-sums_BKR[row_B, second_B], axis=1, kind="stable")
        merged_BR = np.take_along_axis(sums_BKR[row_B, first_B], up_BR, axis=1)
        merged_BR += np.take_along_axis(sums_BKR[row_B, second_B], down_BR, axis=1)
        to_BR = np.empty_like(up_BR), np.empty_like(down_BR)
        np.put_along_axis(to_BR[0], up_BR, number_BR, axis=1)
        np.put_along_axis(to_BR[1], down_BR, number_BR, axis=1)
        for old_B, new_BR in zip((first_B, second_B), to_BR, strict=True):
            row, block = np.nonzero(cluster_BK == old_B[:, None])
            place_BKR[row, block] = new_BR[row[:, None], place_BKR[row, block]]
            cluster_BK[row, block] = first_B[row]
        sums_BKR[row_B, first_B] = merged_BR
        width_BK[row_B, first_B] = merged_BR.max(axis=1) - merged_BR.min(axis=1)
    ids_BKR = np.empty((batch, blocks, ranks), dtype=np.int64)
    np.put_along_axis(ids_BKR, place_BKR, expert_BS.reshape(batch, blocks, ranks), axis=2)
    return ids_BKR.transpose(0, 2, 1).copy()


def longest_first(weight_BG: NDArray[Any], packs: int) -> tuple[Ids, Ids]:
    """As `deepseek.pack_longest_first`, item for item, but for all problems at once: pack and place, `[B, G]`. O(G *
    B * P)."""
    batch, items = weight_BG.shape
    capacity = items // packs
    if capacity == 1:
        return np.tile(np.arange(items), (batch, 1)), np.zeros((batch, items), dtype=np.int64)
    order_BG = np.argsort(-weight_BG, axis=1, kind="stable")
    sorted_GB = np.ascontiguousarray(np.take_along_axis(weight_BG, order_BG, axis=1).T)
    chosen_GB = np.empty((items, batch), dtype=np.int64)
    place_GB = np.empty((items, batch), dtype=np.int64)
    total_BP = np.zeros((batch, packs), dtype=weight_BG.dtype)
    flat_total, flat_filled = total_BP.ravel(), np.zeros(batch * packs, dtype=np.int64)
    base_B = np.arange(batch) * packs
    for item in range(items):
        index_B = total_BP.argmin(axis=1) + base_B
        chosen_GB[item] = index_B
        filled_B = flat_filled[index_B]
        place_GB[item] = filled_B
        filled_B += 1
        flat_filled[index_B] = filled_B
        total_B = flat_total[index_B] + sorted_GB[item]
        total_B[filled_B == capacity] = np.inf
        flat_total[index_B] = total_B
    pack_BG, place_BG = np.empty_like(order_BG), np.empty_like(order_BG)
    np.put_along_axis(pack_BG, order_BG, (chosen_GB - base_B).T, axis=1)
    np.put_along_axis(place_BG, order_BG, place_GB.T, axis=1)
    return pack_BG, place_BG
