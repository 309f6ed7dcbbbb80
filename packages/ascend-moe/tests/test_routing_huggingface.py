# SPDX-License-Identifier: Apache-2.0
"""Routing equals Hugging Face's own routers. Their weight is the identity here, so hidden states are logits."""

from importlib import import_module

import pytest
import torch
from moe_bounds import gamma, routing_steps

from ascend_moe import RoutingSpec, select_experts

TOKENS = 64


def router(family, name, experts, bias=None, **config):
    """A family's own router for `experts` experts, its config made by its own class, with the identity as weight."""
    package = f"transformers.models.{family}"
    config_class = getattr(import_module(f"{package}.configuration_{family}"), f"{name}Config")
    module = import_module(f"{package}.modeling_{family}")
    routers = [value for key, value in vars(module).items() if key.lower() == f"{name}TopkRouter".lower()]
    made = routers[0](config_class(hidden_size=experts, **config))
    made.weight = torch.nn.Parameter(torch.eye(experts), requires_grad=False)
    if bias is not None:
        assert made.e_score_correction_bias.shape == bias.shape
        made.e_score_correction_bias = bias
    return made


def logits_of(kind, experts):
    """Random logits `[T, E]`; ties everywhere; no difference at all; so far apart that softmax underflows."""
    random = torch.randn(TOKENS, experts, generator=torch.Generator().manual_seed(experts))
    return {"random": random, "ties": random.round(), "equal": torch.zeros(TOKENS, experts), "far": random * 60}[kind]


def dense(weights, ids, experts):
    """`[T, E]`: the weight of every expert, 0 where it was not chosen. The order within a token is then gone."""
    return torch.zeros(weights.shape[0], experts).scatter_add(1, ids.long(), weights.float())


def check(made, logits, spec, bias=None):
    """Same experts and same weights, whatever their order: half of the families leave it open (`sorted=False`)."""
    experts = logits.shape[1]
    _, want_weights, want_ids = made(logits)
    weights, ids = select_experts(logits, spec, bias)
    assert want_ids.shape == ids.shape
    want = dense(want_weights, want_ids, experts)
    # Both have a score, its sum over K and a scale, of logits whose difference the exponential takes; below the smallest number nothing is relative.
    spread = min((logits.amax() - logits.amin()).item(), 100.0) if logits.numel() else 0.0
    rounding = 2 * (2 * gamma(routing_steps(experts, spread)) + gamma(ids.shape[1] + 4)).item()
    smallest = torch.finfo(torch.float32).smallest_normal
    torch.testing.assert_close(dense(weights, ids, experts), want, rtol=rounding, atol=smallest)
    # An expert whose weight is 0 contributes nothing: which one fills a place may differ there.
    clear = want_weights.gt(0).all(dim=1)
    assert torch.equal(ids.long().sort(dim=1).values[clear], want_ids.sort(dim=1).values[clear])
    return int(clear.sum())


KINDS = pytest.mark.parametrize("kind", ["random", "ties", "equal", "far"])


@KINDS
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (60, 4), (4, 4)])
def test_qwen3_moe(kind, renormalise, experts, top_k):
    made = router(
        "qwen3_moe", "Qwen3Moe", experts, num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=renormalise
    )
    check(made, logits_of(kind, experts), RoutingSpec(top_k=top_k, scoring="softmax", renormalise=renormalise))


def test_qwen3_moe_in_bfloat16_is_ours_rounded():
    made = router("qwen3_moe", "Qwen3Moe", 32, num_experts=32, num_experts_per_tok=4, norm_topk_prob=True).bfloat16()
    logits = logits_of("random", 32).bfloat16()
    _, want, want_ids = made(logits)
    weights, ids = select_experts(logits, RoutingSpec(top_k=4, scoring="softmax", renormalise=True))
    assert torch.equal(weights.bfloat16(), want)
    assert torch.equal(ids.long(), want_ids)


@KINDS
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 1), (16, 16)])
def test_mixtral(kind, experts, top_k):
    made = router("mixtral", "Mixtral", experts, num_local_experts=experts, num_experts_per_tok=top_k)
    check(made, logits_of(kind, experts), RoutingSpec(top_k=top_k, scoring="softmax", renormalise=True))


@KINDS
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (8, 3), (4, 4)])
def test_deepseek_v2(kind, groups, top_groups):
    made = router(
        "deepseek_v2",
        "DeepseekV2",
        32,
        n_routed_experts=32,
        num_experts_per_tok=6,
        topk_method="greedy" if groups == 1 else "group_limited_greedy",
        n_group=groups,
        topk_group=top_groups,
        routed_scaling_factor=16.0,
    )
    spec = RoutingSpec(
        top_k=6,
        scoring="softmax",
        renormalise=False,
        groups=groups,
        top_groups=top_groups,
        group_score="max",
        routed_scaling_factor=16.0,
    )
    clear = check(made, logits_of(kind, 32), spec)
    assert clear == TOKENS or kind == "far"


@KINDS
@pytest.mark.parametrize("bias_scale", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (8, 4), (2, 1)])
@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "DeepseekV3"), ("glm4_moe", "Glm4Moe")])
def test_deepseek_v3_and_glm4_moe(family, name, groups, top_groups, renormalise, bias_scale, kind):
    bias = torch.randn(64, generator=torch.Generator().manual_seed(7)) * bias_scale
    made = router(
        family,
        name,
        64,
        bias,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    spec = RoutingSpec(
        top_k=8,
        scoring="sigmoid",
        renormalise=renormalise,
        groups=groups,
        top_groups=top_groups,
        group_score="top2_sum",
        bias=True,
        routed_scaling_factor=2.5,
    )
    clear = check(made, logits_of(kind, 64), spec, bias)
    assert clear == TOKENS or kind == "far"


@KINDS
@pytest.mark.parametrize("bias_scale", [0.0, 2.0])
def test_deepseek_v4(kind, bias_scale):
    bias = torch.randn(64, generator=torch.Generator().manual_seed(7)) * bias_scale
    made = router(
        "deepseek_v4",
        "DeepseekV4",
        64,
        bias,
        n_routed_experts=64,
        num_experts_per_tok=6,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
    )
    spec = RoutingSpec(top_k=6, scoring="sqrtsoftplus", renormalise=True, bias=True, routed_scaling_factor=1.5)
    check(made, logits_of(kind, 64), spec, bias)
