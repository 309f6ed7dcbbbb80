# SPDX-License-Identifier: Apache-2.0
"""Which op a layer gets beyond the tables of ascend-linear, and how vLLM's constructors are told the shard."""

from types import ModuleType

import ascend_linear as al
import pytest
from ascend_comm import Topology
from vllm_ascend.config import AscendConfig
from vllm_ascend.deployment import Deployment, Model
from vllm_ascend.layers.select import select
from vllm_ascend.rules import planned_env

SPLIT = planned_env(AscendConfig(enable_flashcomm1=True), Deployment(topology=Topology(2, 1, 1, 1, 2)))
MOE = Model(moe=al.MoeLayers(routed_experts=4), dense_width=64)
SHARED_MLP = planned_env(
    AscendConfig.of({"finegrained_tp_config": {"mlp_tensor_parallel_size": 2}}),
    Deployment(topology=Topology(2, 2, 1, 1, 1), model=MOE),
)


@pytest.mark.parametrize(
    ("direction", "prefix"),
    [("column", "model.layers.0.mlp.gate_proj"), ("row", "model.layers.3.mlp.fc2"), ("column", "layers.1.attn.q_proj")],
)
def test_flashcomm1_leaves_no_layer_of_the_model_behind(direction, prefix):
    with pytest.raises(ValueError, match=rf"'enable_flashcomm1' \(True\) cannot be used .* layer '{prefix}'"):
        select(direction, prefix, SPLIT)
    assert select(direction, prefix, SPLIT, disable_tp=True).op is None


@pytest.mark.parametrize(
    ("direction", "prefix"),
    [
        ("column", "visual.layers.0.mlp.fc1"),
        ("row", "model.layers.0.mlp.shared_experts.down_proj"),
        ("column", "model.layers.0.self_attn.q_b_proj"),
        ("column", "model.projection"),
    ],
)
def test_flashcomm1_lets_be_what_has_all_tokens(direction, prefix):
    assert select(direction, prefix, SPLIT) == (None, 0, 2)


def test_shared_experts_take_no_part_in_mlp_tp():
    assert isinstance(select("column", "model.layers.0.mlp.gate_up_proj", SHARED_MLP).op, al.MLPColumnParallelOp)
    assert select("column", "model.layers.0.mlp.shared_expert.gate_up_proj", SHARED_MLP) == (None, 0, 1)
    assert select("row", "model.layers.0.mlp.shared_expert.down_proj", SHARED_MLP) == (None, 0, 1)


def test_a_constructor_sees_the_shard_and_nobody_else_does():
    from vllm_ascend.compat import shard_of

    def whole():
        return "TP's"

    def construct():
        assert module.get_tensor_model_parallel_rank() == 3
        assert module.get_tensor_model_parallel_world_size() == 8
        raise KeyError

    module = ModuleType("layers")
    module.get_tensor_model_parallel_rank = module.get_tensor_model_parallel_world_size = whole
    with pytest.raises(KeyError), shard_of(module, 3, 8):
        construct()
    assert module.get_tensor_model_parallel_rank is whole
    assert module.get_tensor_model_parallel_world_size is whole


@pytest.mark.parametrize(("tokens", "ranks"), [(5, 2), (6, 3), (1, 4), (7, 4)])
def test_shares_of_tokens_sum_to_the_whole(tokens, ranks):
    """A layer's output on each rank's share, with zeros for the rest, summed as the MoE layer does."""
    import torch
    from vllm_ascend.layers.sequence import _ShareOfTokens

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    for parameter in layer.parameters():  # whole numbers, of which every sum is exact
        parameter.data = torch.randint(-9, 10, parameter.shape).float()
    x = torch.randint(-9, 10, (tokens, 8)).float()
    whole = layer(x)
    summed = torch.zeros_like(whole)
    for rank in range(ranks):
        split = _ShareOfTokens(rank, ranks)
        hooks = [layer.register_forward_pre_hook(split.before), layer.register_forward_hook(split.after)]
        summed += layer(x)
        for hook in hooks:
            hook.remove()
    assert torch.equal(summed, whole)
