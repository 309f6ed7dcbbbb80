# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers: routing, dispatch and combine over expert parallel ranks, grouped and shared experts."""

from ascend_moe.choose import CommMethod, DispatchConfig, Soc, choose_method, mc2_buffer_bytes
from ascend_moe.dispatch import Dispatched, Dispatcher, make_dispatcher
from ascend_moe.env import MoeEnv
from ascend_moe.experts import Activation, Experts, FloatExperts, Gate
from ascend_moe.layer import (
    MoeComm,
    MoeOutput,
    Partial,
    Reduced,
    experts_forward,
    forward_selected,
    make_comm,
    reduced,
)
from ascend_moe.load import counts_to_cumsum, cumsum_to_counts, slot_load
from ascend_moe.prepare import Prepared, TokenDistribution, make_token_distribution
from ascend_moe.quant import W8A8Experts, quantise_weights
from ascend_moe.routing import GroupScore, RoutingSpec, Scoring, select_experts, to_physical
from ascend_moe.shared import SharedExperts, SharedMode

__all__ = [
    "Activation",
    "CommMethod",
    "DispatchConfig",
    "Dispatched",
    "Dispatcher",
    "Experts",
    "FloatExperts",
    "Gate",
    "GroupScore",
    "MoeComm",
    "MoeEnv",
    "MoeOutput",
    "Partial",
    "Prepared",
    "Reduced",
    "RoutingSpec",
    "Scoring",
    "SharedExperts",
    "SharedMode",
    "Soc",
    "TokenDistribution",
    "W8A8Experts",
    "choose_method",
    "counts_to_cumsum",
    "cumsum_to_counts",
    "experts_forward",
    "forward_selected",
    "make_comm",
    "make_dispatcher",
    "make_token_distribution",
    "mc2_buffer_bytes",
    "quantise_weights",
    "reduced",
    "select_experts",
    "slot_load",
    "to_physical",
]
