# SPDX-License-Identifier: Apache-2.0
"""`rebalance`: from a load to a `Plan`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ascend_eplb.metrics import FloatArray, as_load, balancedness, moved_slots
from ascend_eplb.migrate import align_slots, relabel_ranks
from ascend_eplb.placement import Placement, replica_counts, spread
from ascend_eplb.policies.base import Policy, Problem
from ascend_eplb.policies.bound import best_balancedness
from ascend_eplb.policies.registry import find_policy

__all__ = ["Plan", "default_placement", "rebalance", "reduce_to_survivors", "solve"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A placement for a load, and how good it is for that load.

    Args:
        placement: valid, its slots aligned with the previous placement's.
        layer_balancedness: float64 `[L]`, mean rank load / greatest rank load.
        layer_bound: float64 `[L]`, above which no placement gets.
        layer_moved: int64 `[L]`, slots whose weights come from another rank; 0 where there was no previous placement.
    """

    placement: Placement
    layer_balancedness: FloatArray
    layer_bound: FloatArray
    layer_moved: NDArray[np.int64]

    @property
    def balancedness(self) -> float:
        """Balancedness averaged over the layers, 1.0 being perfect."""
        return float(self.layer_balancedness.mean())

    @property
    def bound(self) -> float:
        """Upper bound of the balancedness, averaged over the layers."""
        return float(self.layer_bound.mean())

    @property
    def moved(self) -> int:
        """Slots, over all layers, whose weights come from another rank; 0 where there was no previous placement."""
        return int(self.layer_moved.sum())

    @property
    def moved_fraction(self) -> float:
        """`moved` as a part of all slots of all layers."""
        return self.moved / (self.placement.layers * self.placement.slots)


def rebalance(
    load: ArrayLike,
    *,
    ranks: int,
    slots: int,
    policy: str | Policy = "balanced",
    nodes: int = 1,
    groups: int = 1,
    previous: Placement | None = None,
    max_moves: int | None = None,
) -> Plan:
    """Place experts for a load. For the rarer options build a `Problem` and call `solve`.

    Args:
        load: `[L, E]` (or `[E]`): tokens per logical expert.
        ranks: R.
        slots: S, physical slots over all ranks; R divides S and E <= S <= R * E.
        policy: "balanced", "incremental", "swift", "deepseek", or a function from a `Problem` to a `Placement`.
        nodes: nodes of equally many contiguous ranks.
        groups: expert groups; where `nodes` > 1 divides it, every group stays within one node.
        previous: the placement in force.
        max_moves: most slots that may get new weights, over all layers ("incremental" and "swift").

    Raises:
        TypeError, ValueError: see `Problem` and the policies; the message names the argument.

    Complexity: the policy's.

    Source: the policy's.
    """
    problem = Problem(
        load=as_load(load), ranks=ranks, slots=slots, nodes=nodes, groups=groups, previous=previous,
        max_moves=max_moves,
    )  # fmt: skip
    return solve(problem, policy)


def solve(problem: Problem, policy: str | Policy = "balanced") -> Plan:
    """The plan of a policy for a problem. Where there is a previous placement, ranks of a placement made anew are
    relabelled (within nodes) and slots aligned, so that no expert moves without need.

    Args:
        problem: the load and its constraints, checked on construction.
        policy: as for `rebalance`.

    Raises:
        ValueError: an unknown policy, or a problem that the policy refuses.

    Complexity: the policy's, and O(L * R^2 * E) for relabelling.

    Source: the policy's; what follows it is `relabel_ranks` and `align_slots`.
    """
    placement = find_policy(policy)(problem)
    layer_moved = np.zeros(problem.layers, dtype=np.int64)
    if problem.previous is not None:
        aligned = align_slots(problem.previous, placement)
        layer_moved = moved_slots(problem.previous, aligned)
        if layer_moved.any() and problem.max_moves is None and problem.max_moves_per_layer is None:
            aligned = align_slots(problem.previous, relabel_ranks(problem.previous, placement, nodes=problem.nodes))
            layer_moved = moved_slots(problem.previous, aligned)
        placement = aligned
    return Plan(
        placement=placement,
        layer_balancedness=balancedness(placement, problem.load),
        layer_bound=best_balancedness(problem),
        layer_moved=layer_moved,
    )


def default_placement(problem: Problem) -> Placement:
    """The `spread` layout of a problem's sizes, for where no placement is in force yet. O(L * S)."""
    redundant = problem.slots - problem.num_experts
    return spread(num_experts=problem.num_experts, ranks=problem.ranks, redundant=redundant, layers=problem.layers)


def reduce_to_survivors(problem: Problem, failed_ranks: tuple[int, ...]) -> Problem:
    """The same problem over the ranks that are left, numbered anew in their old order.

    The slots per rank stay. A previous placement is cut to the survivors; an expert that was on failed ranks only takes
    the slot of a replica of the most replicated expert (its weights have to be loaded from elsewhere). Groups and nodes
    are kept where every node lost equally many ranks and dropped otherwise.

    Raises:
        ValueError: no such rank, none left, or too few slots left for all experts.

    Complexity: O(L * S), and O(S) for each expert whose last replica is lost.

    Source: this project.
    """
    failed = sorted(set(failed_ranks))
    outside = [rank for rank in failed if not 0 <= rank < problem.ranks]
    if outside:
        raise ValueError(f"failed_ranks={failed_ranks} names rank {outside[0]}, which is not in 0..{problem.ranks - 1}")
    alive = [rank for rank in range(problem.ranks) if rank not in failed]
    slots = len(alive) * problem.slots_per_rank
    if slots < problem.num_experts:
        raise ValueError(f"failed_ranks={failed_ranks} leaves {slots} slots for {problem.num_experts} experts")
    per_node = problem.ranks // problem.nodes
    left_N = np.bincount(np.array(alive) // per_node, minlength=problem.nodes)
    even = bool((left_N == left_N[0]).all())
    return replace(
        problem,
        ranks=len(alive),
        slots=slots,
        nodes=problem.nodes if even else 1,
        groups=problem.groups if even else 1,
        previous=None if problem.previous is None else _survivors(problem.previous, alive),
    )


def _survivors(previous: Placement, alive: list[int]) -> Placement:
    ids_LRK = previous.physical_to_logical[:, alive].copy()
    for ids_RK in ids_LRK:
        count_E = replica_counts(ids_RK.reshape(1, -1), previous.num_experts)[0]
        for expert in np.flatnonzero(count_E == 0):
            donor = count_E.argmax()
            rank, slot = np.argwhere(ids_RK == donor)[0]
            ids_RK[rank, slot] = expert
            count_E[donor] -= 1
            count_E[expert] += 1
    return Placement(ids_LRK, previous.num_experts, previous.layer_ids)
