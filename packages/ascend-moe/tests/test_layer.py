# SPDX-License-Identifier: Apache-2.0
"""A layer on one rank, and what layers refuse. Several ranks: test_world.py."""

import subprocess
import sys

import pytest
import torch
from ascend_comm import Solo
from moe_bounds import assert_close, float_layer
from moe_oracle import gates, normal

from ascend_moe import (
    CommMethod,
    FloatExperts,
    MoeEnv,
    Partial,
    RoutingSpec,
    SharedExperts,
    experts_forward,
    forward_selected,
    make_comm,
    make_dispatcher,
    reduced,
    select_experts,
)

SPEC = RoutingSpec(top_k=2, scoring="sigmoid", renormalise=True, bias=True, routed_scaling_factor=2.5)
ALONE = MoeEnv(ep=Solo(), num_slots=4)
X, LOGITS, BIAS = normal(9, 64, seed=1).bfloat16(), normal(9, 4, seed=2), normal(4, seed=3)
W13, W2 = (normal(4, 64, 96, seed=4) / 8).bfloat16(), (normal(4, 48, 64, seed=5) / 7).bfloat16()


def npu(*tensors):
    return [tensor.to("npu") for tensor in tensors]


@pytest.mark.parametrize("method", [CommMethod.ALL_GATHER, CommMethod.ALL_TO_ALL_V])
def test_one_rank_equals_the_dense_layer(method):
    w13, w2 = npu(W13, W2)
    output = experts_forward(
        *npu(X, LOGITS),
        spec=SPEC,
        experts=FloatExperts(w13=w13, w2=w2),
        comm=make_comm(method, ALONE),
        bias=BIAS.to("npu"),
    )
    dense = float_layer(X, gates(LOGITS, SPEC, BIAS), W13, W2, dtype=torch.bfloat16)
    assert_close(reduced(output, Solo()), dense.out, dense.allowed)
    assert isinstance(output, Partial) is (method is CommMethod.ALL_GATHER)
    ids = select_experts(LOGITS, SPEC, BIAS)[1]
    assert output.load.tolist() == [(ids == expert).sum().item() for expert in range(4)]


def test_log2phy_must_not_depend_on_the_rank_in_all_gather():
    with pytest.raises(ValueError, match=r"log2phy must be None with all-gather: .* give routing_table"):
        experts_forward(
            X,
            LOGITS,
            spec=SPEC,
            experts=FloatExperts(w13=W13, w2=W2),
            comm=make_comm(CommMethod.ALL_GATHER, ALONE),
            bias=BIAS,
            log2phy=torch.arange(4, dtype=torch.int32),
        )


def test_the_slots_must_be_all():
    weights, ids = select_experts(LOGITS, SPEC, BIAS)
    with pytest.raises(ValueError, match="experts has 3 slots, must have 4: num_slots=4 over 1 ranks"):
        forward_selected(
            X,
            weights,
            ids,
            experts=FloatExperts(w13=W13[:3], w2=W2[:3]),
            comm=make_comm(CommMethod.ALL_TO_ALL_V, ALONE),
        )


def test_a_sharded_shared_expert_does_not_go_with_sequence_parallelism():
    env = MoeEnv(ep=Solo(), num_slots=4, sequence_parallel=True)
    with pytest.raises(
        ValueError, match=r"shared.mode='tensor_parallel' must be 'replicated' under sequence parallelism"
    ):
        experts_forward(
            X,
            LOGITS,
            spec=SPEC,
            experts=FloatExperts(w13=W13, w2=W2),
            comm=make_comm(CommMethod.ALL_TO_ALL_V, env),
            bias=BIAS,
            shared=SharedExperts(mlp=torch.nn.Identity(), mode="tensor_parallel"),
        )


def test_choices_that_cannot_be():
    with pytest.raises(ValueError, match="mode='everywhere' must be one of tensor_parallel, replicated"):
        SharedExperts(mlp=torch.nn.Identity(), mode="everywhere")
    with pytest.raises(ValueError, match=r"method='mc2' must be one of CommMethod.ALL_GATHER"):
        make_dispatcher("mc2", ALONE)
    with pytest.raises(ValueError, match="mc2=None must be a communicator of its own"):
        make_comm(CommMethod.MC2, ALONE)
    with pytest.raises(RuntimeError, match="no HCCL communicator"):
        make_comm(CommMethod.MC2, MoeEnv(ep=Solo(), mc2=Solo(), num_slots=4))


def test_without_torch_npu_there_is_a_remedy():
    code = """
import sys
sys.modules["torch_npu"] = None
import torch
from ascend_moe import kernels
try:
    kernels.swiglu(torch.ones(1, 2))
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PATH": ""},
    )
    assert done.stdout.startswith("mixture-of-experts kernels need torch_npu: pip install torch-npu")
