# SPDX-License-Identifier: Apache-2.0
"""`log2phy_balanced`: the replica that each rank sends its tokens to, chosen by loads and nodes.

Every source rank holds 1/R of an expert's tokens and sends them to one replica, so a replica's share is a whole number
of R-ths (its *quota*). Quotas start as the classic rule has them and move one unit at a time from the hottest rank to
the coldest that it can reach; the sources of each replica within its quota are then chosen by locality.

Legend: L layers, E logical experts, R ranks, S physical slots, Q replicas in expert order (L * S of them, flat).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ascend_eplb.cluster import Cluster
from ascend_eplb.maps import log2phy_all, replica_table
from ascend_eplb.metrics import FloatArray, as_load
from ascend_eplb.placement import IntArray, Placement

__all__ = ["log2phy_balanced", "received_loads"]


def log2phy_balanced(placement: Placement, loads: ArrayLike, cluster: Cluster) -> IntArray:
    """int32 `[R, L, E]`: the replica (physical id) each rank sends its tokens to, balanced for `loads`.

    Never worse than the classic rule (`log2phy_all(placement, cluster.tp_size)`): in no layer is the greatest
    `received_loads` above the classic one. Within that limit a rank uses a replica of its own, or else one in its node.

    Args:
        placement: where the replicas are.
        loads: `[L, E]` tokens per logical expert, taken as evenly spread over the source ranks.
        cluster: ranks and nodes; its ranks must be the placement's.

    Raises:
        TypeError, ValueError: loads that do not fit this placement, or another number of ranks.

    Complexity: O(L * S * R) and at most 4 * S rounds of O(L * S).

    Source: this project; steepest descent on whole quotas, then an assignment by distance.
    """
    if cluster.ranks != placement.ranks:
        raise ValueError(f"cluster.ranks={cluster.ranks}, but the placement has {placement.ranks}")
    load_LE = as_load(loads, num_experts=placement.num_experts, layers=placement.layers)
    order_LS, start_LE, count_LE = replica_table(placement)
    quota_LS = _classic_quotas(order_LS, start_LE, count_LE, placement.ranks)
    _move_quotas(placement, load_LE, order_LS, quota_LS)
    chosen = _assign(placement, cluster, (order_LS, start_LE, count_LE), quota_LS)
    classic = log2phy_all(placement, cluster.tp_size)
    worse_L = received_loads(placement, chosen, load_LE).max(axis=1) > received_loads(placement, classic, load_LE).max(
        axis=1
    ) * (1 + 1e-12)
    chosen[:, worse_L] = classic[:, worse_L]
    return chosen


def received_loads(placement: Placement, maps: IntArray, loads: ArrayLike) -> FloatArray:
    """float64 `[L, R]`: the load each rank receives when source ranks follow `maps` `[R, L, E]` of physical ids.

    Complexity: O(R * L * E).

    Errors: TypeError, ValueError as `rank_loads`.
    Source: the definition.
    """
    load_LE = as_load(loads, num_experts=placement.num_experts, layers=placement.layers)
    target_RLE = maps // placement.slots_per_rank + np.arange(placement.layers)[:, None] * placement.ranks
    weight_RLE = np.broadcast_to(load_LE / placement.ranks, target_RLE.shape)
    total = np.bincount(target_RLE.ravel(), weight_RLE.ravel(), placement.layers * placement.ranks)
    return np.asarray(total.reshape(placement.layers, placement.ranks))


def _classic_quotas(order_LS: IntArray, start_LE: IntArray, count_LE: IntArray, ranks: int) -> IntArray:
    """`[L, S]` in replica order: how many source ranks the rule `rank % replicas` gives to each replica."""
    expert_LS = _expert_of(start_LE, order_LS.shape[1])
    position_LS = np.arange(order_LS.shape[1]) - np.take_along_axis(start_LE, expert_LS, axis=1)
    replicas_LS = np.take_along_axis(count_LE, expert_LS, axis=1)
    return (ranks // replicas_LS + (position_LS < ranks % replicas_LS)).astype(np.int32)


def _expert_of(start_LE: IntArray, slots: int) -> NDArray[np.int64]:
    """`[L, S]`: the expert of each replica, in replica order."""
    marks = np.zeros((start_LE.shape[0], slots), dtype=np.int64)
    np.put_along_axis(marks, start_LE[:, 1:].astype(np.int64), 1, axis=1)
    return np.cumsum(marks, axis=1)


def _move_quotas(placement: Placement, load_LE: FloatArray, order_LS: IntArray, quota_LS: IntArray) -> None:
    """Move quota units, one per layer and round, off each layer's hottest rank while its peak falls. In place."""
    layers, ranks, slots = placement.layers, placement.ranks, placement.slots
    expert_LS = np.take_along_axis(placement.physical_to_logical.reshape(layers, -1), order_LS, axis=1)
    unit_LS = np.take_along_axis(load_LE, expert_LS, axis=1) / ranks
    rank_LS = order_LS // placement.slots_per_rank
    received_LR = _sum_by_rank(unit_LS * quota_LS, rank_LS, ranks)
    active = np.arange(layers)
    for _ in range(4 * slots):
        if not len(active):
            return
        hot_A = received_LR[active].argmax(axis=1)
        peak_A = received_LR[active, hot_A]
        here_AS = np.take_along_axis(received_LR[active], rank_LS[active], axis=1)
        gain_AS = peak_A[:, None] - (here_AS + unit_LS[active])
        movable_ASx = (rank_LS[active] == hot_A[:, None]) & (quota_LS[active] > 1)
        row_A = np.arange(len(active))
        taken_AE = np.full((len(active), placement.num_experts), -1, dtype=np.int64)
        row, column = np.nonzero(movable_ASx)
        taken_AE[row, expert_LS[active[row], column]] = column
        giver_AS = np.take_along_axis(taken_AE, expert_LS[active], axis=1)
        gain_AS = np.where((giver_AS >= 0) & (rank_LS[active] != hot_A[:, None]), gain_AS, -1.0)
        gain_AS = np.minimum(gain_AS, unit_LS[active])
        best_A = gain_AS.argmax(axis=1)
        better_A = gain_AS[row_A, best_A] > peak_A * 1e-9
        active, row_A, best_A = active[better_A], row_A[better_A], best_A[better_A]
        given_A = giver_AS[row_A, best_A]
        unit_A = unit_LS[active, best_A]
        quota_LS[active, given_A] -= 1
        quota_LS[active, best_A] += 1
        received_LR[active, rank_LS[active, given_A]] -= unit_A
        received_LR[active, rank_LS[active, best_A]] += unit_A


def _sum_by_rank(value_LS: FloatArray, rank_LS: NDArray[np.signedinteger], ranks: int) -> FloatArray:
    layers = value_LS.shape[0]
    keys = rank_LS + np.arange(layers)[:, None] * ranks
    return np.asarray(np.bincount(keys.ravel(), value_LS.ravel(), layers * ranks).reshape(layers, ranks))


def _assign(
    placement: Placement, cluster: Cluster, table: tuple[IntArray, IntArray, IntArray], quota_LS: IntArray
) -> IntArray:
    """`[R, L, E]`: sources to replicas within the quotas: the own rank first, then the node, then the rest."""
    order_LS, start_LE, count_LE = table
    ranks, node_R = placement.ranks, cluster.node_of()
    single_LE = np.take_along_axis(order_LS, start_LE, axis=1)
    chosen_RLE = np.repeat(single_LE[None], ranks, axis=0)
    shared_layer, shared_expert = np.nonzero(count_LE > 1)
    if not len(shared_layer):
        return chosen_RLE
    start_X, count_X = start_LE[shared_layer, shared_expert], count_LE[shared_layer, shared_expert]
    most = int(count_X.max())
    column_XC = np.minimum(start_X[:, None] + np.arange(most), order_LS.shape[1] - 1)
    physical_XC = order_LS[shared_layer[:, None], column_XC]
    left_XC = np.where(np.arange(most) < count_X[:, None], quota_LS[shared_layer[:, None], column_XC], 0)
    rank_XC = physical_XC // placement.slots_per_rank
    pick_XR = np.full((len(start_X), ranks), -1, dtype=np.int64)
    own_x, own_c = np.nonzero(left_XC > 0)
    pick_XR[own_x, rank_XC[own_x, own_c]] = own_c
    left_XC[own_x, own_c] -= 1
    near_XCR = node_R[rank_XC][:, :, None] == node_R
    row_X = np.arange(len(start_X))
    for same_node in (True, False):
        for rank in range(ranks):
            room_XC = left_XC * near_XCR[:, :, rank] if same_node else left_XC
            best_X = room_XC.argmax(axis=1)
            free_X = (pick_XR[:, rank] < 0) & (room_XC[row_X, best_X] > 0)
            pick_XR[free_X, rank] = best_X[free_X]
            left_XC[row_X[free_X], best_X[free_X]] -= 1
    chosen_RLE[:, shared_layer, shared_expert] = np.take_along_axis(physical_XC, pick_XR, axis=1).T
    return chosen_RLE
