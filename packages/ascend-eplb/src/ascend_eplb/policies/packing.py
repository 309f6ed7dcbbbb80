# SPDX-License-Identifier: Apache-2.0
"""Replica counts and packing, vectorised over independent problems (layers, or layers x nodes).

Legend: B problems, E experts, S items (replicas), R ranks, K = S / R slots per rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray

__all__ = [
    "balanced_packing_vectorised",
    "capped_replica_counts",
    "descending_order",
    "difference",
    "difference_peaks",
    "shares",
    "sorted_items",
]

Ids = NDArray[np.int64]
_FEW = 48  # redundant slots up to which `_first_replicas` costs more than it saves


def capped_replica_counts(load_BE: NDArray[np.floating], slots: int, cap: int) -> Ids:
    """Replicas `[B, E]` of each expert: one, then each further slot to the greatest load per replica below `cap`.

    This is the method of highest averages; it minimises the greatest load per replica. Quotients are of the loads' own
    type, so that float32 loads give the published algorithm's counts. O((S - E) * B * E) in the worst case; with many
    further slots all but a few of them are given at once.
    """
    batch, experts = load_BE.shape
    spare = slots - experts
    count_BE, left_B = _first_replicas(load_BE, spare, cap) if spare > _FEW else (None, np.full(batch, spare))
    if count_BE is None:
        count_BE = np.ones((batch, experts), dtype=np.int64)
        share_BE = load_BE.copy()
    else:
        share_BE = np.where(count_BE < cap, load_BE / count_BE, -1.0).astype(load_BE.dtype)
    if cap == 1:
        return count_BE
    flat_load, flat_count, flat_share = load_BE.ravel(), count_BE.ravel(), share_BE.ravel()
    base_B = np.arange(batch) * experts
    least = int(left_B.min(initial=0))
    for turn in range(int(left_B.max(initial=0))):
        index_B = share_BE.argmax(axis=1) + base_B
        if turn >= least:
            index_B = index_B[left_B > turn]
        more_B = flat_count[index_B] + 1
        flat_count[index_B] = more_B
        flat_share[index_B] = np.where(more_B < cap, flat_load[index_B] / more_B, -1.0)
    return count_BE


def _first_replicas(load_BE: NDArray[np.floating], spare: int, cap: int) -> tuple[Ids, Ids]:
    """Counts `[B, E]` that highest averages pass through, and how many of the `spare` slots are left `[B]`.

    All quotients above a threshold come before all below it, so any threshold with at most `spare` quotients above will
    do. Lowering it by one part in 1 / x of the load takes about one slot, which makes x easy to find.
    """
    wide_BE = load_BE.astype(np.float64)
    total_B = wide_BE.sum(axis=1)
    part_BE = wide_BE / np.where(total_B > 0, total_B, 1.0)[:, None]
    inverse_B = np.full(len(load_BE), float(spare))  # 1 / threshold
    taken_B, step_B = np.minimum(np.floor(part_BE * spare), cap - 1).sum(axis=1), np.ones(len(load_BE))
    for _ in range(5):
        trial_B = inverse_B + (spare - taken_B) * step_B
        found_B = np.minimum(np.floor(part_BE * trial_B[:, None]), cap - 1).sum(axis=1)
        fits_B = found_B <= spare
        inverse_B, taken_B = np.where(fits_B, trial_B, inverse_B), np.where(fits_B, found_B, taken_B)
        step_B = np.where(fits_B, step_B, step_B / 2)
    # a little higher, so that a rounded quotient cannot be on the wrong side
    extra_BE = np.minimum(np.floor(part_BE * (inverse_B * (1 - 1e-6))[:, None]), cap - 1).astype(np.int64)
    return extra_BE + 1, spare - extra_BE.sum(axis=1)


def shares(load_BE: FloatArray, ids_BRK: NDArray[Any]) -> FloatArray:
    """float64 `[B, R, K]`: the load of each slot, replicas of an expert sharing evenly. O(B * S)."""
    batch, experts = load_BE.shape
    keys = ids_BRK.reshape(batch, -1) + np.arange(batch)[:, None] * experts
    count = np.bincount(keys.ravel(), minlength=batch * experts)
    return np.asarray((load_BE.ravel() / np.maximum(count, 1))[keys].reshape(ids_BRK.shape))


def descending_order(value_BX: NDArray[np.floating]) -> Ids:
    """int64 `[B, X]`: the places of non-negative values, greatest first, equal ones in their order. O(B * X log X).

    The bits of such numbers sort as they do. With the places in the low bits of 64-bit keys, plain sorting does what a
    stable argsort does, in a fraction of its time. float32 is exact; float64 gives up its last bits, so that values
    closer than about 1e-11 of each other count as equal.
    """
    size = value_BX.shape[1]
    if value_BX.dtype == np.float32:
        key_BX = (~(value_BX + np.float32(0)).view(np.uint32)).astype(np.uint64) << np.uint64(32)  # + 0: no -0.0
        low = np.uint64(2**32 - 1)
    else:
        low = np.uint64((1 << size.bit_length()) - 1)
        key_BX = ~(value_BX.astype(np.float64) + 0.0).view(np.uint64) & ~low
    key_BX |= np.arange(size, dtype=np.uint64)
    key_BX.sort(axis=1)
    key_BX &= low
    return key_BX.view(np.int64)


def sorted_items(load_BE: NDArray[np.floating], count_BE: Ids) -> tuple[Ids, NDArray[np.floating]]:
    """All replicas, heaviest first, those of one expert next to each other: expert and load of each, `[B, S]`."""
    batch, experts = load_BE.shape
    share_BE = load_BE / count_BE
    flat_BE = descending_order(share_BE) + np.arange(batch)[:, None] * experts
    repeats = count_BE.ravel()[flat_BE].ravel()
    flat_S = np.repeat(flat_BE.ravel(), repeats)
    return (flat_S % experts).reshape(batch, -1), share_BE.ravel()[flat_S].reshape(batch, -1)


def difference(expert_BS: Ids, share_BS: NDArray[np.floating], ranks: int) -> Ids:
    """Balanced largest-first differencing (Michiels et al., 2003): experts `[B, R, K]`, duplicates possible.

    The sorted items form K blocks of R, each a tuple of partial rank sums. The two tuples of widest spread are merged,
    heaviest sum with lightest, until one is left. Pairs (K = 2) are so packed optimally. Tuples are kept in ascending
    order; the rank of each item is worked out afterwards, from the last merge back to the first. O(B * S log R).
    """
    batch, slots = expert_BS.shape
    blocks = slots // ranks
    merges, last_B, _ = _merge_blocks(share_BS, ranks)
    row_B1 = np.arange(batch)[:, None] * ranks
    place_QR = np.empty((batch * blocks, ranks), dtype=np.int64)
    place_QR[last_B] = np.arange(ranks)
    for first_B, second_B, order_BR in reversed(merges):
        before_BR = order_BR.ravel()[place_QR[first_B] + row_B1]
        place_QR[first_B], place_QR[second_B] = before_BR, ranks - 1 - before_BR
    item_QR = np.arange(1, batch * blocks + 1)[:, None] * ranks - 1 - place_QR
    ids_BKR = expert_BS.ravel()[item_QR].reshape(batch, blocks, ranks)
    return np.ascontiguousarray(ids_BKR.transpose(0, 2, 1))


def difference_peaks(share_BS: NDArray[np.floating], ranks: int) -> NDArray[np.floating]:
    """`[B]`: the greatest rank load that `difference` leaves, without the packing itself."""
    return _merge_blocks(share_BS, ranks)[2]


def _merge_blocks(
    share_BS: NDArray[np.floating], ranks: int
) -> tuple[list[tuple[Ids, Ids, Ids]], Ids, NDArray[np.floating]]:
    """The merges of `difference`: the two tuples of each (numbers 0..B * K - 1) and the order of the sums; the number
    of the last tuple `[B]` and its greatest sum `[B]`."""
    batch, slots = share_BS.shape
    blocks = slots // ranks
    sums_QR = np.ascontiguousarray(share_BS.reshape(batch * blocks, ranks)[:, ::-1])  # Q = B * K tuples
    width_BK = (sums_QR[:, -1] - sums_QR[:, 0]).reshape(batch, blocks)
    flat_width, base_B = width_BK.ravel(), np.arange(batch) * blocks
    row_B1 = np.arange(batch)[:, None] * ranks
    merges, first_B = [], base_B
    for _ in range(blocks - 1):
        first_B = width_BK.argmax(axis=1) + base_B
        flat_width[first_B] = -1.0
        second_B = width_BK.argmax(axis=1) + base_B
        flat_width[second_B] = -2.0
        merged_BR = sums_QR[first_B] + sums_QR[second_B, ::-1]
        order_BR = np.argsort(merged_BR, axis=1, kind="stable")
        merged_BR = merged_BR.ravel()[order_BR + row_B1]
        sums_QR[first_B] = merged_BR
        flat_width[first_B] = merged_BR[:, -1] - merged_BR[:, 0]
        merges.append((first_B, second_B, order_BR))
    return merges, first_B, sums_QR[first_B, -1]


def balanced_packing_vectorised(weight_BG: NDArray[np.float32], packs: int) -> tuple[Ids, Ids]:
    """What `deepseek.balanced_packing` returns, computed for all problems at once: pack and place, `[B, G]`.

    Complexity: O(G * B * P).
    """
    batch, items = weight_BG.shape
    capacity = items // packs
    if capacity == 1:
        return np.tile(np.arange(items), (batch, 1)), np.zeros((batch, items), dtype=np.int64)
    order_BG = descending_order(weight_BG) + np.arange(batch)[:, None] * items
    sorted_GB = np.ascontiguousarray(weight_BG.ravel()[order_BG].T)
    base_B = np.arange(batch) * packs
    chosen_GB, place_GB = np.empty((items, batch), dtype=np.int64), np.zeros((items, batch), dtype=np.int64)
    total_BP, filled_BP = np.zeros((batch, packs), dtype=weight_BG.dtype), np.zeros((batch, packs), dtype=np.int64)
    flat_total, flat_filled = total_BP.ravel(), filled_BP.ravel()
    started = packs if (sorted_GB[packs - 1] > 0).all() else 0
    if started:  # the heaviest items go to empty packs, one each
        chosen_GB[:packs] = base_B + np.arange(packs)[:, None]
        total_BP[...], filled_BP[...] = sorted_GB[:packs].T, 1
    for item in range(started, items):
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
    pack_BG.ravel()[order_BG] = (chosen_GB - base_B).T
    place_BG.ravel()[order_BG] = place_GB.T
    return pack_BG, place_BG
