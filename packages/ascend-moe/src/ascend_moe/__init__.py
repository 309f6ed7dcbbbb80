# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts building blocks for Ascend NPUs: routing, choice of communication method, expert load counts."""

from ascend_moe.choose import CommMethod, Deployment, Soc, choose_method
from ascend_moe.load import counts_to_cumsum, cumsum_to_counts, slot_load
from ascend_moe.routing import GroupScore, RoutingSpec, Scoring, select_experts

__all__ = [
    "CommMethod",
    "Deployment",
    "GroupScore",
    "RoutingSpec",
    "Scoring",
    "Soc",
    "choose_method",
    "counts_to_cumsum",
    "cumsum_to_counts",
    "select_experts",
    "slot_load",
]
