# SPDX-License-Identifier: Apache-2.0
"""A lower bound of the greatest rank load.

Legend: L layers, E experts, R ranks, N nodes, G groups.
"""

from __future__ import annotations

import numpy as np

from ascend_eplb.metrics import FloatArray
from ascend_eplb.policies.base import Problem
from ascend_eplb.policies.packing import capped_replica_counts

__all__ = ["best_balancedness", "peak_bound"]


def peak_bound(problem: Problem) -> FloatArray:
    """float64 `[L]`: a lower bound of the greatest rank load that any valid placement can reach.

    The greatest of: the mean rank load; the least possible greatest load per replica (highest averages, with the
    replica cap); without redundancy, the heaviest expert with the K - 1 lightest; and, where groups are bound to
    nodes, the mean in the node that must hold the heaviest group with the lightest others. Not always reachable.
    O((S - E) * L * E).

    No errors.
    Source: highest averages minimise the greatest quotient (Balinski and Young, 1982); the rest is counting.
    """
    load_LE = problem.load
    bound_L: FloatArray = load_LE.sum(axis=1) / problem.ranks
    over_LE = np.divide(load_LE, bound_L[:, None], out=np.ones_like(load_LE), where=bound_L[:, None] > 0)
    wanted_LE = np.ceil(np.maximum(over_LE, 1))  # replicas with which no share is above the mean rank load
    short_L = (wanted_LE.sum(axis=1) > problem.slots) | (wanted_LE.max(axis=1) > problem.replica_cap)
    count_LE = capped_replica_counts(load_LE[short_L], problem.slots, problem.replica_cap)
    bound_L[short_L] = np.maximum(bound_L[short_L], (load_LE[short_L] / count_LE).max(axis=1))
    if problem.slots == problem.num_experts:
        light_LE = np.sort(load_LE, axis=1)
        alone_L = light_LE[:, -1] + light_LE[:, : problem.slots_per_rank - 1].sum(axis=1)
        bound_L = np.maximum(bound_L, alone_L)
    if not problem.hierarchical:
        return np.asarray(bound_L)
    per_node = problem.groups // problem.nodes
    group_LG = np.sort(load_LE.reshape(problem.layers, problem.groups, -1).sum(axis=2), axis=1)
    node_L = group_LG[:, -1] + group_LG[:, : per_node - 1].sum(axis=1)
    if per_node == 2:
        node_L = (group_LG + group_LG[:, ::-1]).max(axis=1)
    return np.asarray(np.maximum(bound_L, node_L / (problem.ranks // problem.nodes)))


def best_balancedness(problem: Problem) -> FloatArray:
    """float64 `[L]`: an upper bound of the balancedness, from `peak_bound`; 1.0 for a layer without load.

    O((S - E) * L * E). No errors.
    Source: `peak_bound`.
    """
    peak_L = peak_bound(problem)
    mean_L = problem.load.sum(axis=1) / problem.ranks
    ratio_L = np.divide(mean_L, peak_L, out=np.ones_like(peak_L), where=peak_L > 0)
    return np.asarray(np.minimum(ratio_L, 1.0))
