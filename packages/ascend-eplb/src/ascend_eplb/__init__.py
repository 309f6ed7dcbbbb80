# SPDX-License-Identifier: Apache-2.0
"""Expert placement for mixture-of-experts serving: placements, maps, balancing, migration. Needs NumPy alone."""

from ascend_eplb.cluster import Cluster
from ascend_eplb.dispatch import log2phy_balanced, received_loads
from ascend_eplb.formats import append_loads, load_placement, read_loads, save_placement, usual_numbering, write_loads
from ascend_eplb.layers import LayerMatch, Numbering, fit_layers, match_layers, select_layers
from ascend_eplb.load import LoadWindow, decayed_load, logical_load, mean_load, merge_ranks, peak_load
from ascend_eplb.maps import expert_map, expert_map_all, log2phy, log2phy_all, routing_table
from ascend_eplb.metrics import balancedness, moved_slots, peak_to_mean, rank_loads
from ascend_eplb.migrate import TransferPlan, align_slots, relabel_ranks, transfer_plan
from ascend_eplb.placement import Placement, checkpoint, from_physical_to_logical, spread
from ascend_eplb.plan import Plan, rebalance, reduce_to_survivors, solve
from ascend_eplb.policies.base import Policy, Problem
from ascend_eplb.policies.bound import best_balancedness, peak_bound
from ascend_eplb.policies.deepseek import deepseek_assignment
from ascend_eplb.policies.registry import policy_names
from ascend_eplb.schedule import transfer_batches, verify_transfers
from ascend_eplb.simulate import Score, simulate

__all__ = [
    "Cluster",
    "LayerMatch",
    "LoadWindow",
    "Numbering",
    "Placement",
    "Plan",
    "Policy",
    "Problem",
    "Score",
    "TransferPlan",
    "align_slots",
    "append_loads",
    "balancedness",
    "best_balancedness",
    "checkpoint",
    "decayed_load",
    "deepseek_assignment",
    "expert_map",
    "expert_map_all",
    "fit_layers",
    "from_physical_to_logical",
    "load_placement",
    "log2phy",
    "log2phy_all",
    "log2phy_balanced",
    "logical_load",
    "match_layers",
    "mean_load",
    "merge_ranks",
    "moved_slots",
    "peak_bound",
    "peak_load",
    "peak_to_mean",
    "policy_names",
    "rank_loads",
    "read_loads",
    "rebalance",
    "received_loads",
    "reduce_to_survivors",
    "relabel_ranks",
    "routing_table",
    "save_placement",
    "select_layers",
    "simulate",
    "solve",
    "spread",
    "transfer_batches",
    "transfer_plan",
    "usual_numbering",
    "verify_transfers",
    "write_loads",
]
