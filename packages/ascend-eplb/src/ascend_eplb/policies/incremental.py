# SPDX-License-Identifier: Apache-2.0
"""`incremental` and `swift`: from the placement in force, moving few experts.

Legend: L layers, E experts, R ranks, K slots per rank, N nodes, B = L * N problems.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray, moved_slots, rank_loads
from ascend_eplb.migrate import align_slots, relabel_ranks
from ascend_eplb.placement import Placement
from ascend_eplb.policies.balanced import balanced_assignment
from ascend_eplb.policies.base import Problem
from ascend_eplb.policies.bound import peak_bound
from ascend_eplb.policies.moves import MoveRules, State, held_experts, improve

__all__ = ["incremental", "swift"]


def incremental(problem: Problem) -> Placement:
    """Swap and replace from `previous` until `target` of the bound, within the move limits of the call and each layer.

    Where that stalls below the target, a layer may be placed anew (`balanced`, ranks relabelled) if the limits allow
    it. Under a limit for the whole call the layers share it by gain per move. Without `previous` this is `balanced`.

    Complexity: O(moves per layer * L * S * K * C), C = 6 to 20 cold ranks, by R.
    """
    if problem.previous is None:
        return Placement(balanced_assignment(problem).astype(np.int32), problem.num_experts)
    previous = problem.previous
    if problem.hierarchical and not _is_bound(problem, previous):
        states = [_as_state(problem, previous)]
    else:
        states = _trajectory(problem, previous, swaps=True, pinned_LRK=None)
    if (states[-1].peak_B > peak_bound(problem) / problem.target).any():
        states = _with_fresh(problem, previous, states)
    return _within_limits(problem, previous, states)


def swift(problem: Problem) -> Placement:
    """Move redundant replicas only: the first replica of every expert in `previous` stays where it is.

    Limits and target as for `incremental`; every change is one transfer.

    Raises:
        ValueError: no `previous`, or one that does not keep groups within nodes as the problem asks.

    Complexity: as `incremental`.
    """
    previous = problem.previous
    if previous is None:
        raise ValueError("policy='swift' moves redundant experts of the placement in force: give previous")
    if problem.hierarchical and not _is_bound(problem, previous):
        raise ValueError("policy='swift' cannot bring groups to nodes: previous does not keep each group in one node")
    pinned_LRK = _base_copies(previous)
    return _within_limits(problem, previous, _trajectory(problem, previous, swaps=False, pinned_LRK=pinned_LRK))


def _base_copies(previous: Placement) -> NDArray[np.bool_]:
    """bool `[L, R, K]`: the first slot of each expert."""
    ids_LS = previous.physical_to_logical.reshape(previous.layers, -1)
    keys = ids_LS + np.arange(previous.layers)[:, None] * previous.num_experts
    _, first = np.unique(keys, return_index=True)
    pinned = np.zeros(ids_LS.size, dtype=bool)
    pinned[first] = True
    return pinned.reshape(previous.physical_to_logical.shape)


def _is_bound(problem: Problem, placement: Placement) -> bool:
    """Whether every group has all its replicas within one node."""
    per_node = problem.ranks // problem.nodes
    held_LRE = held_experts(placement.physical_to_logical, problem.num_experts)
    held_LNE = held_LRE.reshape(problem.layers, problem.nodes, per_node, -1).any(axis=2)
    held_LNG = held_LNE.reshape(problem.layers, problem.nodes, problem.groups, -1).any(axis=3)
    return bool((held_LNG.sum(axis=1) == 1).all())


def _trajectory(
    problem: Problem, previous: Placement, *, swaps: bool, pinned_LRK: NDArray[np.bool_] | None
) -> list[State]:
    """The state of all layers after each round of changes; the first is `previous`."""
    nodes = problem.nodes if problem.hierarchical else 1
    shape = (problem.layers * nodes, problem.ranks // nodes, problem.slots_per_rank)
    limits = [problem.slots // nodes, problem.max_moves_per_layer, problem.max_moves]
    rules = MoveRules(
        goal_B=np.repeat(peak_bound(problem) / problem.target, nodes),
        budget=min(limit for limit in limits if limit is not None),
        cap=problem.replica_cap,
        swaps=swaps,
        pinned_BRK=None if pinned_LRK is None else pinned_LRK.reshape(shape),
    )
    ids_BRK = previous.physical_to_logical.reshape(shape).astype(np.int64)
    states = improve(np.repeat(problem.load, nodes, axis=0), ids_BRK, rules)
    return [
        State(
            state.moved_B.reshape(-1, nodes).sum(axis=1),
            state.peak_B.reshape(-1, nodes).max(axis=1),
            state.ids_BRK.reshape(previous.physical_to_logical.shape),
        )
        for state in states
    ]


def _as_state(problem: Problem, placement: Placement) -> State:
    peak_L = rank_loads(placement, problem.load).max(axis=1)
    moved_L = moved_slots(problem.previous or placement, placement)
    return State(moved_L, peak_L, placement.physical_to_logical)


def _with_fresh(problem: Problem, previous: Placement, states: list[State]) -> list[State]:
    """The states, and as the last one every layer placed anew, with ranks relabelled."""
    fresh = Placement(balanced_assignment(problem).astype(np.int32), problem.num_experts, previous.layer_ids)
    fresh = relabel_ranks(previous, fresh, nodes=problem.nodes if problem.hierarchical else 1)
    fresh = align_slots(previous, fresh)
    return [*states, _as_state(problem, fresh)]


def _within_limits(problem: Problem, previous: Placement, states: list[State]) -> Placement:
    """For each layer the state that its share of the moves allows, with the fewest moves that meet the target."""
    moved_TL = np.stack([state.moved_B for state in states])
    peak_TL = np.stack([state.peak_B for state in states])
    goal_L = peak_bound(problem) / problem.target
    worth_TL = np.where(peak_TL > 0, goal_L / np.where(peak_TL > 0, peak_TL, 1.0), 1.0)
    worth_TL = np.minimum(worth_TL, 1.0)
    if problem.max_moves_per_layer is not None:
        worth_TL[moved_TL > problem.max_moves_per_layer] = -1.0
    budget = problem.max_moves if problem.max_moves is not None else problem.layers * problem.slots
    chosen_L = _share_moves_among_layers(moved_TL, worth_TL, budget)
    ids_LRK = np.stack([states[turn].ids_BRK[layer] for layer, turn in enumerate(chosen_L)])
    return Placement(ids_LRK, problem.num_experts, previous.layer_ids)


def _share_moves_among_layers(moved_TL: NDArray[np.int64], worth_TL: FloatArray, budget: int) -> NDArray[np.int64]:
    """The state chosen for each layer `[L]`: changes with the greatest gain per move first, while moves are left."""
    layers = moved_TL.shape[1]
    chosen_L = np.zeros(layers, dtype=np.int64)

    def best_step(layer: int) -> tuple[float, int, int] | None:
        now = chosen_L[layer]
        gain = worth_TL[:, layer] - worth_TL[now, layer]
        cost = moved_TL[:, layer] - moved_TL[now, layer]
        useful = (gain > 1e-12) & (cost <= budget)
        if not useful.any():
            return None
        rate = np.where(useful, gain / np.maximum(cost, 0.5), -np.inf)
        turn = int(rate.argmax())
        return -float(rate[turn]), layer, turn

    heap = [step for layer in range(layers) if (step := best_step(layer)) is not None]
    heapq.heapify(heap)
    while heap:
        _, layer, turn = heapq.heappop(heap)
        cost = int(moved_TL[turn, layer] - moved_TL[chosen_L[layer], layer])
        if cost <= budget:
            budget -= cost
            chosen_L[layer] = turn
        step = best_step(layer)
        if step is not None:
            heapq.heappush(heap, step)
    return chosen_L
