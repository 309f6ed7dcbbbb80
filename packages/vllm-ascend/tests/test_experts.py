# SPDX-License-Identifier: Apache-2.0
"""Which communication method a deployment may take, without an engine."""

from dataclasses import replace

import pytest
from ascend_comm import Topology
from ascend_linear import MoeLayers
from ascend_moe import Soc
from vllm_ascend.config import EplbConfig
from vllm_ascend.experts import sizes, uses_mc2
from vllm_ascend.layout import Deployment, Model

DEEPSEEK = Model(moe=MoeLayers(routed_experts=256), moe_layer_ids=tuple(range(3, 61)), experts_per_token=8, hidden=7168)
WIDE = Deployment(topology=Topology(32, 32, 1, 1, 1), data_parallel_asked=32, model=DEEPSEEK, expert_parallel=True)


def test_sizes_of_a_deployment_with_redundant_experts():
    chosen_by = sizes(EplbConfig(num_redundant_experts=32), WIDE, Soc.A3, 64, 2000)
    assert (chosen_by.ep_size, chosen_by.tp_size, chosen_by.experts_per_rank, chosen_by.top_k) == (32, 1, 9, 8)
    assert chosen_by.mc2_capacity == 64
    assert uses_mc2(chosen_by)


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
    assert uses_mc2(sizes(EplbConfig(), deployment, soc, 64, 2000)) is mc2


def test_a_small_hccl_buffer_is_an_error_before_anything_is_built():
    with pytest.raises(
        ValueError,
        match=r"HCCL_BUFFSIZE \(200 MB\) must be 478 or more for MC2: 64 tokens of 7168 .* lower max_num_seqs \(64\)",
    ):
        sizes(EplbConfig(), WIDE, Soc.A3, 64, 200)
