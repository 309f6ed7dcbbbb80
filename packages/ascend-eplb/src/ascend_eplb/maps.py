# SPDX-License-Identifier: Apache-2.0
"""The maps that kernels take, as pure functions of a `Placement`.

Legend: L layers, E logical experts, R ranks, K slots per rank; physical id = rank * K + slot.
All maps are int32; their last axis has one entry for each *logical* expert.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.placement import IntArray, Placement

__all__ = ["expert_map", "expert_map_all", "log2phy", "log2phy_all", "replica_table", "routing_table"]


def expert_map(placement: Placement, rank: int) -> IntArray:
    """int32 `[L, E]`: the local slot of each logical expert on `rank`, -1 where the rank does not hold it.

    Without redundancy this is vLLM's own linear expert map.

    Raises:
        ValueError: `rank` is not one of the placement's.

    Complexity: O(L * E).

    Source: vLLM's `determine_expert_map`, generalised to any placement.
    """
    _check_rank(placement, rank)
    slots_LE = np.full((placement.layers, placement.num_experts), -1, dtype=np.int32)
    np.put_along_axis(slots_LE, placement.physical_to_logical[:, rank], _slot_numbers(placement), axis=1)
    return slots_LE


def expert_map_all(placement: Placement) -> IntArray:
    """int32 `[R, L, E]`: `expert_map` of every rank. O(R * L * E).

    No errors.
    Source: as `expert_map`.
    """
    shape = (placement.ranks, placement.layers, placement.num_experts)
    slots_RLE = np.full(shape, -1, dtype=np.int32)
    ids_RLK = placement.physical_to_logical.transpose(1, 0, 2)
    np.put_along_axis(slots_RLE, ids_RLK, _slot_numbers(placement)[None], axis=2)
    return slots_RLE


def log2phy(placement: Placement, rank: int, tp_size: int = 1) -> IntArray:
    """int32 `[L, E]`: the physical id of the replica of each expert that `rank` sends its tokens to, by the classic
    rule.

    Replicas are numbered in rank order; `rank` takes number `rank % replicas`, and where `tp_size` > 1 number
    `(rank % tp_size + rank // tp_size + expert) % replicas`. The rule takes neither loads nor nodes into account:
    see `log2phy_balanced`.

    Raises:
        ValueError: `rank` is not one of the placement's, or `tp_size` does not divide the number of ranks.

    Complexity: O(L * S log S).

    Source: the rule of vLLM-Ascend's expert load balancer.
    """
    _check_rank(placement, rank)
    return np.asarray(_classic(placement, np.array([rank]), tp_size)[0])


def log2phy_all(placement: Placement, tp_size: int = 1) -> IntArray:
    """int32 `[R, L, E]`: `log2phy` of every rank. O(R * L * E + L * S log S).

    Errors: ValueError as `log2phy`.
    Source: as `log2phy`.
    """
    return _classic(placement, np.arange(placement.ranks), tp_size)


def routing_table(placement: Placement, rows: int) -> IntArray:
    """int32 `[L, rows, E]`: physical ids by token position: the token at position t uses row `t % rows`.

    Row t takes replica number `(t + expert) % replicas` (in rank order), so that the tokens of one rank spread over all
    replicas whatever the number of ranks. Shares are exactly even where `replicas` divides `rows`.

    Raises:
        ValueError: `rows` < 1.

    Complexity: O(L * rows * E).

    Source: round robin over the replicas, as tokens come.
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")
    order_LS, start_LE, count_LE = replica_table(placement)
    turn_1TE = (np.arange(rows)[:, None] + np.arange(placement.num_experts))[None]
    index_LTE = start_LE[:, None] + turn_1TE % count_LE[:, None]
    flat = np.take_along_axis(order_LS, index_LTE.reshape(placement.layers, -1).astype(np.intp), axis=1)
    return np.asarray(flat.reshape(index_LTE.shape))


def replica_table(placement: Placement) -> tuple[IntArray, IntArray, IntArray]:
    """The replicas of every expert in rank order, as ragged rows.

    Returns:
        order `[L, S]`: physical ids, grouped by expert and ascending within one; start `[L, E]`: where each expert's
        group begins; count `[L, E]`: its length. All int32.

    Complexity: O(L * S) (radix sort).
    """
    ids_LS = placement.physical_to_logical.reshape(placement.layers, -1)
    narrow = ids_LS.astype(np.uint16) if placement.num_experts <= 1 << 16 else ids_LS
    order_LS = np.argsort(narrow, axis=1, kind="stable").astype(np.int32)
    count_LE = placement.replicas
    start_LE = np.cumsum(count_LE, axis=1, dtype=np.int32) - count_LE
    return order_LS, start_LE, count_LE


def _classic(placement: Placement, rank_Q: NDArray[np.int64], tp_size: int) -> IntArray:
    """`[Q, L, E]`: the classic rule for the ranks in `rank_Q`."""
    if tp_size < 1 or placement.ranks % tp_size:
        raise ValueError(f"tp_size={tp_size} must divide the {placement.ranks} ranks")
    order_LS, start_LE, count_LE = replica_table(placement)
    turn_QE: IntArray = rank_Q.astype(np.int32)[:, None]
    if tp_size > 1:
        group_QE, within_QE = np.divmod(turn_QE, np.int32(tp_size))
        turn_QE = np.asarray(within_QE + group_QE + np.arange(placement.num_experts, dtype=np.int32), dtype=np.int32)
    row_L1 = np.arange(placement.layers, dtype=np.int32)[:, None] * placement.slots
    index_QLE = turn_QE[:, None] % count_LE
    index_QLE += start_LE + row_L1
    return np.asarray(order_LS.ravel()[index_QLE])


def _slot_numbers(placement: Placement) -> IntArray:
    return np.arange(placement.slots_per_rank, dtype=np.int32)[None]


def _check_rank(placement: Placement, rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"rank must be an integer, not {rank!r}")
    if not 0 <= rank < placement.ranks:
        raise ValueError(f"rank={rank} is not in 0..{placement.ranks - 1}")
