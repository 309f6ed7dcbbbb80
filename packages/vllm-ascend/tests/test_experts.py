# SPDX-License-Identifier: Apache-2.0
"""Which communication method a deployment may take, without an engine."""

from dataclasses import replace

import pytest
from ascend_comm import Topology
from ascend_linear import MoeLayers
from ascend_moe import Soc
from vllm_ascend.config import EplbConfig
from vllm_ascend.deployment import Deployment, Model
from vllm_ascend.eplb.placement import placement_of
from vllm_ascend.experts import sizes, uses_mc2

DEEPSEEK = Model(moe=MoeLayers(routed_experts=256), moe_layer_ids=tuple(range(3, 61)), experts_per_token=8, hidden=7168)
WIDE = Deployment(topology=Topology(32, 32, 1, 1, 1), data_parallel_asked=32, model=DEEPSEEK, expert_parallel=True)


def chosen_by(soc=Soc.A3, deployment=WIDE, buffsize_mb=2000, **eplb):
    slots = placement_of(EplbConfig(**eplb), deployment).slots_per_rank
    return sizes(deployment, slots_per_rank=slots, soc=soc, max_num_seqs=64, hccl_buffsize_mb=buffsize_mb)


def test_sizes_of_a_deployment_with_redundant_experts():
    found = chosen_by(num_redundant_experts=32)
    assert (found.ep_size, found.tp_size, found.experts_per_rank, found.top_k) == (32, 1, 9, 8)
    assert found.mc2_capacity == 64
    assert uses_mc2(found)


@pytest.mark.parametrize(
    ("soc", "model", "ep", "mc2"),
    [
        (Soc.A3, {}, True, True),
        (Soc.A2, {}, True, True),
        (Soc.P310, {}, True, False),
        (Soc.A3, {}, False, False),
        (Soc.A3, {"experts_per_token": 17}, True, False),
        (Soc.A3, {"half_precision": False}, True, False),
        (Soc.A3, {"hidden": 7169}, True, False),
        (Soc.A3, {"hidden": 8224}, True, False),
    ],
)
def test_mc2_is_used_where_its_kernels_take_the_model(soc, model, ep, mc2):
    deployment = replace(WIDE, model=replace(DEEPSEEK, **model), expert_parallel=ep)
    assert uses_mc2(chosen_by(soc, deployment)) is mc2


def test_a_small_hccl_buffer_is_an_error_before_anything_is_built():
    with pytest.raises(
        ValueError,
        match=r"HCCL_BUFFSIZE \(200 MB\) must be 478 or more for MC2: 64 tokens of 7168 .* lower max_num_seqs \(64\)",
    ):
        chosen_by(buffsize_mb=200)
