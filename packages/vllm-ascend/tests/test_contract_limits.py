# SPDX-License-Identifier: Apache-2.0
"""The numbers by which the product keeps within the rules of kernels are those of the rules (ascend_sim/contracts)."""

import pytest
import torch
from ascend_linear import state
from ascend_moe import choose, routing
from ascend_sim.contracts import KernelRule
from ascend_sim.contracts import rules as contract_rules
from vllm_ascend import rules
from vllm_ascend.quantization import moe

RULES = contract_rules()


def rule(id: str) -> KernelRule:
    """An enforced rule."""
    assert RULES[id].enforced
    return RULES[id]


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (state._MATMUL_ALLREDUCE_RANKS, rule("npu_mm_all_reduce_base.ranks").allowed),
        (state._MATMUL_REDUCE_SCATTER_RANKS, rule("npu_mm_reduce_scatter_base.ranks").allowed),
        (rules._MATMUL_REDUCE_SCATTER_RANKS, rule("npu_mm_reduce_scatter_base.ranks").allowed),
        (moe._ALIGNMENT, rule("npu_dequant_swiglu_quant.alignment").multiple),
        (choose._MC2_TOKENS_PER_RANK, rule("npu_moe_distribute_dispatch_v2.batch").most),
    ],
)
def test_limits_are_those_of_the_rules(mine, theirs):
    assert mine == theirs


def test_the_fused_all_reduce_is_ruled_out_on_atlas_a3_alone():
    assert rule("npu_mm_all_reduce_base.chip").chips == ("A3",)


@pytest.mark.parametrize("groups", [2, 4, 8, 16, 32, 64])
def test_groups_of_experts_that_the_router_gives_the_kernel_are_those_it_takes(groups):
    least, most = rule("npu_moe_gating_top_k.group-size").least, rule("npu_moe_gating_top_k.aligned-experts").most
    spec = routing.RoutingSpec(
        top_k=1, scoring="softmax", renormalise=True, groups=groups, top_groups=1, group_score="max"
    )
    for per_group in (2, 3, 31, 32, 33, 256, 2048):
        logits = torch.empty(1, per_group * groups, device="npu")
        aligned = -(-per_group // 32) * 32 * groups
        assert routing._kernel_routes(logits, spec) == (per_group >= least and aligned <= most)
