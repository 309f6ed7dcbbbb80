# SPDX-License-Identifier: Apache-2.0
"""`balanced`, the default: the best balance of the policies here, without regard to a placement in force.

Its steps: replicate experts by capped highest averages; pack them by balanced differencing and by the published
longest-first rule, and keep the better result of each layer, so that no layer is below the published algorithm; swap
slots of hot ranks with those of cold ranks; and, for ranks of few slots, search over the replica counts. Each step
treats all layers at once.

Legend: L layers, E experts, R ranks, K slots per rank, N nodes, G groups, B = L * N problems.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import comb, factorial

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray, sum_slots
from ascend_eplb.placement import Placement, replica_counts
from ascend_eplb.policies.base import Problem
from ascend_eplb.policies.bound import peak_bound
from ascend_eplb.policies.deepseek import repaired_assignment
from ascend_eplb.policies.packing import (
    balanced_packing_vectorised,
    capped_replica_counts,
    difference,
    shares,
    sorted_items,
)
from ascend_eplb.policies.refine import refine
from ascend_eplb.policies.repair import repair_duplicates
from ascend_eplb.policies.search import anneal_counts, pair_peaks, search_pair_counts

__all__ = ["balanced", "balanced_assignment"]

Ids = NDArray[np.int64]
_SLACK = 7e-4  # a layer whose peak is within this part of the bound is done
_ROUNDS = 10  # of swaps, which take a few milliseconds
_SMALL = 48  # slots of a problem small enough for annealing
_PACKINGS = 10  # ways of giving groups to nodes that a small problem tries


def balanced(problem: Problem) -> Placement:
    """The balanced placement of a problem. Ignores `previous`, so it cannot keep to a move limit.

    Raises:
        ValueError: the problem limits the moves.

    Complexity: O(L * S * (R + K)) for a fixed number of rounds.
    """
    if problem.max_moves is not None or problem.max_moves_per_layer is not None:
        raise ValueError("policy='balanced' places anew and cannot keep to max_moves; use 'incremental'")
    ids_LRK = balanced_assignment(problem)
    return Placement(ids_LRK.astype(np.int32), problem.num_experts, problem.layer_ids)


def balanced_assignment(problem: Problem) -> Ids:
    """int64 `[L, R, K]`: the experts of the placement that `balanced` returns."""
    goal_L = peak_bound(problem) * (1 + _SLACK)
    orders = [_pack_groups(problem)]
    everywhere = np.arange(problem.layers)
    if problem.slots_per_rank == 2 and not problem.hierarchical:
        return _not_below_published(problem, _search_and_pack_layers(problem, orders[0], everywhere, goal_L))
    best_LRK = _pack_layers(problem, orders[0], everywhere)
    best_LRK = _keep_better(problem, best_LRK, repaired_assignment(problem, balanced_packing_vectorised))
    best_LRK = _swap_within_nodes(problem, best_LRK, goal_L)
    if problem.slots == problem.num_experts and not problem.hierarchical:
        return best_LRK
    if problem.slots > _SMALL and problem.slots_per_rank != 2:
        return best_LRK
    if problem.slots <= _SMALL and problem.hierarchical and _packings(problem.groups, problem.nodes) <= _PACKINGS:
        orders += _all_orders(problem)
    for order_LE in orders:
        unfinished = np.flatnonzero(_peaks(problem, best_LRK) > goal_L)
        if len(unfinished):
            found_LRK = best_LRK.copy()
            found_LRK[unfinished] = _search_and_pack_layers(problem, order_LE, unfinished, goal_L)
            best_LRK = _keep_better(problem, best_LRK, _swap_within_nodes(problem, found_LRK, goal_L))
    return best_LRK


def _not_below_published(problem: Problem, ids_LRK: Ids) -> Ids:
    """For two slots a rank: the published placement in the layers where it is better.

    The published placement is worked out only for layers where it can be better: those where its replica counts, paired
    in the best way, give a lower peak, and those where it gives an expert more replicas than there are ranks, because
    the repair of duplicates then changes the counts.
    """
    if problem.max_replicas:
        return ids_LRK
    count_LE = capped_replica_counts(problem.load.astype(np.float32), problem.slots, problem.slots)
    least_L = pair_peaks(problem.load, count_LE)
    open_A = np.flatnonzero((_peaks(problem, ids_LRK) > least_L) | (count_LE.max(axis=1) > problem.ranks))
    if not len(open_A):
        return ids_LRK
    theirs_LRK = ids_LRK.copy()
    theirs_LRK[open_A] = repaired_assignment(problem, balanced_packing_vectorised, open_A)
    return _keep_better(problem, ids_LRK, theirs_LRK)


def _pack_layers(problem: Problem, order_LE: Ids, layers: Ids) -> Ids:
    """`[A, R, K]` for the A rows in `layers`: counts by highest averages, packed by differencing inside each node."""
    load_BE = _by_node(problem, problem.load[layers], order_LE[layers])
    nodes = problem.nodes if problem.hierarchical else 1
    count_BE = capped_replica_counts(load_BE, problem.slots // nodes, problem.replica_cap)
    return _to_global(problem, _pack(load_BE, count_BE, problem.ranks // nodes), order_LE[layers])


def _search_and_pack_layers(problem: Problem, order_LE: Ids, layers: Ids, goal_L: FloatArray) -> Ids:
    """`[A, R, K]` for the A rows in `layers`: replica counts by search, packed by differencing inside each node."""
    load_BE = _by_node(problem, problem.load[layers], order_LE[layers])
    nodes = problem.nodes if problem.hierarchical else 1
    ranks, cap = problem.ranks // nodes, problem.replica_cap
    count_BE = capped_replica_counts(load_BE, problem.slots // nodes, cap)
    if problem.slots_per_rank == 2 and problem.slots > problem.num_experts:
        count_BE = search_pair_counts(load_BE, count_BE, ranks=ranks, cap=cap)
    ids_BRK = _pack(load_BE, count_BE, ranks)
    if problem.slots_per_rank * problem.ranks <= _SMALL and problem.slots > problem.num_experts:
        peak_B = sum_slots(shares(load_BE, ids_BRK)).max(axis=1)
        unfinished = np.flatnonzero(peak_B > np.repeat(goal_L[layers], nodes))
        ids_BRK[unfinished] = _anneal_and_pack(load_BE[unfinished], count_BE[unfinished], ids_BRK[unfinished], cap)
    return _to_global(problem, ids_BRK, order_LE[layers])


def _anneal_and_pack(load_AE: FloatArray, count_AE: Ids, ids_ARK: Ids, cap: int) -> Ids:
    """The best packing without duplicates that annealing the counts finds; `ids_ARK` where none is better."""
    if not len(load_AE):
        return ids_ARK
    ranks = ids_ARK.shape[1]
    count_ACE = anneal_counts(load_AE, count_AE, ranks=ranks, cap=cap)
    chains = count_ACE.shape[1]
    load_XE = np.repeat(load_AE, chains, axis=0)
    packed_XRK = _pack(load_XE, count_ACE.reshape(len(load_XE), -1), ranks)
    found_ACRK = np.concatenate([ids_ARK[:, None], packed_XRK.reshape(-1, chains, *ids_ARK.shape[1:])], axis=1)
    load_XE = np.repeat(load_AE, chains + 1, axis=0)
    peak_X = sum_slots(shares(load_XE, found_ACRK.reshape(len(load_XE), ranks, -1))).max(axis=1)
    return np.asarray(found_ACRK[np.arange(len(load_AE)), peak_X.reshape(-1, chains + 1).argmin(axis=1)])


def _pack(load_BE: FloatArray, count_BE: Ids, ranks: int) -> Ids:
    """Pack these replicas by differencing, without duplicates and without changing their numbers."""
    expert_BS, share_BS = sorted_items(load_BE, count_BE)
    ids_BRK = repair_duplicates(difference(expert_BS, share_BS, ranks), load_BE)
    other_B = (replica_counts(ids_BRK.reshape(len(ids_BRK), -1), load_BE.shape[1]) != count_BE).any(axis=1)
    if (
        other_B.any()
    ):  # deal replicas to the ranks in turn: those of one expert follow each other, and so come to different ranks
        ids_BRK[other_B] = expert_BS[other_B].reshape(-1, expert_BS.shape[1] // ranks, ranks).transpose(0, 2, 1)
    return ids_BRK


def _pack_groups(problem: Problem) -> Ids:
    """`[L, E]`: the experts in the order of the nodes that their groups are packed to; 0..E-1 without groups."""
    layers, groups, nodes = problem.layers, problem.groups, problem.nodes
    if not problem.hierarchical:
        return np.broadcast_to(np.arange(problem.num_experts), (layers, problem.num_experts))
    load_LG = problem.load.reshape(layers, groups, -1).sum(axis=2)
    one_LG = np.ones((layers, groups), dtype=np.int64)
    packed_LNP = _pack(load_LG, one_LG, nodes)
    refine(packed_LNP, shares(load_LG, packed_LNP), load_LG.sum(axis=1) / nodes, 4 * nodes)
    return _experts_of(problem, packed_LNP)


def _experts_of(problem: Problem, packed_LNP: Ids) -> Ids:
    """`[L, E]`: the experts of the groups `[L, N, G / N]`, in that order."""
    size = problem.num_experts // problem.groups
    first_LG1 = packed_LNP.reshape(len(packed_LNP), -1, 1) * size
    return np.asarray((first_LG1 + np.arange(size)).reshape(len(packed_LNP), -1))


def _packings(groups: int, nodes: int) -> int:
    """The number of ways to distribute the groups over nodes, when nodes are interchangeable."""
    size = groups // nodes
    ways, left = 1, groups
    for _ in range(nodes):
        ways *= comb(left, size)
        left -= size
    return ways // factorial(nodes)


def _all_orders(problem: Problem) -> list[Ids]:
    """The expert order `[L, E]` of every way to distribute the groups over nodes, equal in all layers."""
    size = problem.groups // problem.nodes

    def ways(left: tuple[int, ...]) -> Iterator[list[int]]:
        if not left:
            yield []
            return
        for mates in combinations(left[1:], size - 1):
            node = [left[0], *mates]
            for rest in ways(tuple(group for group in left if group not in node)):
                yield node + rest

    found = []
    for way in ways(tuple(range(problem.groups))):
        packed_1NP = np.array(way, dtype=np.int64).reshape(1, problem.nodes, size)
        found.append(np.repeat(_experts_of(problem, packed_1NP), problem.layers, axis=0))
    return found


def _by_node(problem: Problem, load_LE: FloatArray, order_LE: Ids) -> FloatArray:
    """`[L * N, E / N]`: the loads of the experts of each node."""
    if not problem.hierarchical:
        return load_LE
    return np.asarray(np.take_along_axis(load_LE, order_LE, axis=1).reshape(len(load_LE) * problem.nodes, -1))


def _to_global(problem: Problem, ids_BRK: Ids, order_LE: Ids) -> Ids:
    """Node-local expert numbers of `[L * N, R / N, K]` to logical ids of `[L, R, K]`."""
    shape = (len(order_LE), problem.ranks, problem.slots_per_rank)
    if not problem.hierarchical:
        return ids_BRK.reshape(shape)
    first_N1 = np.arange(problem.nodes)[:, None] * (problem.num_experts // problem.nodes)
    position_LS = (ids_BRK.reshape(shape[0], problem.nodes, -1) + first_N1).reshape(shape[0], -1)
    return np.take_along_axis(order_LE, position_LS, axis=1).reshape(shape)


def _peaks(problem: Problem, ids_LRK: Ids) -> FloatArray:
    return np.asarray(sum_slots(shares(problem.load, ids_LRK)).max(axis=1))


def _keep_better(problem: Problem, ours_LRK: Ids, theirs_LRK: Ids) -> Ids:
    """Per layer the one with the lower peak, ours if equal; theirs only if it respects the replica cap."""
    lower_L = _peaks(problem, theirs_LRK) < _peaks(problem, ours_LRK)
    if problem.max_replicas and lower_L.any():
        count_LE = replica_counts(theirs_LRK.reshape(problem.layers, -1), problem.num_experts)
        lower_L &= count_LE.max(axis=1) <= problem.max_replicas
    return np.where(lower_L[:, None, None], theirs_LRK, ours_LRK)


def _swap_within_nodes(problem: Problem, ids_LRK: Ids, goal_L: FloatArray) -> Ids:
    """Swap slots within each node until `goal_L` or for a bounded number of rounds."""
    nodes = problem.nodes if problem.hierarchical else 1
    shape = (problem.layers * nodes, problem.ranks // nodes, problem.slots_per_rank)
    ids_BRK = ids_LRK.reshape(shape).copy()
    share_BRK = shares(problem.load, ids_LRK).reshape(shape).copy()
    refine(ids_BRK, share_BRK, np.repeat(goal_L, nodes), _ROUNDS)
    return ids_BRK.reshape(ids_LRK.shape)
