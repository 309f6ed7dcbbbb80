# SPDX-License-Identifier: Apache-2.0
"""The algorithm DeepSeek published as EPLB (2025), reimplemented plainly: the reference for the other policies.

Three steps where groups are bound to nodes: pack groups to nodes, replicate inside each node, pack replicas to ranks.
Sums are float32, as published, so that the result is the same bit for bit unless loads tie.

Legend: B independent problems (layers, or layers x nodes), E experts, S slots, G items to pack, P packs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ascend_eplb.metrics import as_load
from ascend_eplb.placement import Placement
from ascend_eplb.policies.base import Problem
from ascend_eplb.policies.repair import repair_duplicates

__all__ = ["balanced_packing", "deepseek", "deepseek_assignment", "repaired_assignment", "replicate_experts"]

Ids = NDArray[np.int64]
Weights = NDArray[np.float32]
Pack = Callable[[Weights, int], tuple[Ids, Ids]]


def deepseek(problem: Problem) -> Placement:
    """The published placement, repaired where replicas of an expert share a rank; see `deepseek_assignment`.

    `max_replicas` and the move limits are not part of the algorithm.

    Raises:
        ValueError: the problem sets one of those.

    Complexity: O(L * S * R) in plain Python.
    """
    if problem.max_replicas or problem.max_moves is not None or problem.max_moves_per_layer is not None:
        raise ValueError(
            "policy='deepseek' supports neither max_replicas nor max_moves; use 'balanced' or 'incremental'"
        )
    ids_LRK = repaired_assignment(problem, balanced_packing)
    return Placement(ids_LRK.astype(np.int32), problem.num_experts, problem.layer_ids)


def repaired_assignment(problem: Problem, pack: Pack, layers: Ids | None = None) -> Ids:
    """int64 `[A, R, K]`: the published result with duplicates repaired within their node.

    Args:
        problem: the load, the sizes, and nodes and groups.
        pack: `balanced_packing` or a function with its results.
        layers: the A rows wanted; all by default.
    """
    nodes = problem.nodes if problem.hierarchical else 1
    load_LE = problem.load if layers is None else problem.load[layers]
    ids_LS = deepseek_assignment(
        load_LE, slots=problem.slots, ranks=problem.ranks, nodes=nodes, groups=problem.groups, pack=pack
    )
    ids_BRK = ids_LS.reshape(len(load_LE) * nodes, problem.ranks // nodes, -1)
    fixed_BRK = repair_duplicates(ids_BRK, np.repeat(load_LE, nodes, axis=0))
    return np.asarray(fixed_BRK.reshape(len(load_LE), problem.ranks, -1))


def deepseek_assignment(
    load: ArrayLike, *, slots: int, ranks: int, nodes: int = 1, groups: int = 1, pack: Pack | None = None
) -> Ids:
    """int64 `[L, S]`: the published result (`phy2log`) without repair: a rank may hold an expert twice.

    Args:
        load: `[L, E]`.
        slots: S, a multiple of `ranks` and at least E.
        ranks: R.
        nodes: N, which divides R. Where it does not divide `groups`, both count as 1.
        groups: G, which divides E.
        pack: another function with the results of `balanced_packing`, the default.

    Raises:
        TypeError, ValueError: a load that `as_load` refuses, or sizes that do not divide.

    Complexity: O(L * S * R) in plain Python.

    Source: github.com/deepseek-ai/EPLB, `rebalance_experts`.
    """
    pack = pack or balanced_packing
    load_LE = as_load(load).astype(np.float32)
    layers, experts = load_LE.shape
    sizes = (slots, ranks, nodes, groups)
    if min(sizes) < 1 or slots % ranks or slots < experts or ranks % nodes or experts % groups:
        raise ValueError(f"slots={slots}, ranks={ranks}, nodes={nodes}, groups={groups} do not fit {experts} experts")
    if groups % nodes:
        nodes = groups = 1
    size = experts // groups
    node_LG, place_LG = pack(load_LE.reshape(layers, groups, size).sum(axis=-1, dtype=np.float32), nodes)
    first_LG = (node_LG * (groups // nodes) + place_LG) * size
    position_LE = (first_LG[:, :, None] + np.arange(size)).reshape(layers, experts)
    expert_at_LE = np.argsort(position_LE, axis=1)
    load_BE = np.take_along_axis(load_LE, expert_at_LE, axis=1).reshape(layers * nodes, -1)
    local_BS, count_BE = replicate_experts(load_BE, slots // nodes)
    share_BE: Weights = np.divide(load_BE, count_BE, dtype=np.float32, casting="same_kind")
    share_BS = np.take_along_axis(share_BE, local_BS, axis=1)
    rank_BS, slot_BS = pack(share_BS, ranks // nodes)
    physical_BS = np.argsort(rank_BS * (slots // ranks) + slot_BS, axis=1)
    sorted_BS = np.take_along_axis(local_BS, physical_BS, axis=1).reshape(layers, nodes, -1)
    sorted_BS = sorted_BS + (np.arange(nodes) * (experts // nodes))[:, None]
    return np.take_along_axis(expert_at_LE, sorted_BS.reshape(layers, slots), axis=1)


def balanced_packing(weight_BG: Weights, packs: int) -> tuple[Ids, Ids]:
    """Give each item, heaviest first, to the lightest pack with room; all packs hold G / P items.

    Returns:
        pack `[B, G]` and place within the pack `[B, G]`, both int64.
    """
    batch, items = weight_BG.shape
    capacity = items // packs
    if capacity == 1:
        return np.tile(np.arange(items), (batch, 1)), np.zeros((batch, items), dtype=np.int64)
    pack_BG, place_BG = np.empty((batch, items), dtype=np.int64), np.empty((batch, items), dtype=np.int64)
    order_BG = np.argsort(-weight_BG, axis=1, kind="stable")
    for row in range(batch):
        total = [np.float32(0)] * packs
        filled = [0] * packs
        for item in order_BG[row]:
            pack = min((p for p in range(packs) if filled[p] < capacity), key=total.__getitem__)
            pack_BG[row, item], place_BG[row, item] = pack, filled[pack]
            total[pack] += weight_BG[row, item]
            filled[pack] += 1
    return pack_BG, place_BG


def replicate_experts(weight_BE: Weights, slots: int) -> tuple[Ids, Ids]:
    """Give every expert a slot, then each further slot to the expert with the greatest load per replica, in float32.

    Returns:
        expert of each slot `[B, S]` and replicas of each expert `[B, E]`, both int64.
    """
    batch, experts = weight_BE.shape
    expert_BS = np.tile(np.arange(slots), (batch, 1))
    count_BE = np.ones((batch, experts), dtype=np.int64)
    row_B = np.arange(batch)
    share_BE = weight_BE.copy()
    for slot in range(experts, slots):
        hottest_B = share_BE.argmax(axis=1)
        expert_BS[:, slot] = hottest_B
        count_BE[row_B, hottest_B] += 1
        share_BE[row_B, hottest_B] = weight_BE[row_B, hottest_B] / count_BE[row_B, hottest_B].astype(np.float32)
    return expert_BS, count_BE
