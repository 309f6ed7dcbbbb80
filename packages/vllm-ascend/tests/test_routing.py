# SPDX-License-Identifier: Apache-2.0
"""Experts chosen among groups: what vLLM's router is given, against vLLM's own plain function."""

import pytest
import torch


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("groups", "open_groups"), [(4, 2), (1, 1), (8, 8)])
def test_grouped_topk(scoring, biased, groups, open_groups):
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router
    from vllm_ascend.layers.routing import grouped_topk

    random = torch.Generator().manual_seed(5)
    logits = torch.randn(33, 32, generator=random)
    bias = torch.randn(32, generator=random) if biased else None
    common = {
        "topk": 5, "renormalize": scoring == "sigmoid", "num_expert_group": groups, "topk_group": open_groups, "scoring_func": scoring,
        "routed_scaling_factor": 2.5,
    }  # fmt: skip
    expected = grouped_topk_router.grouped_topk(logits, logits, **common, e_score_correction_bias=bias)
    for device in ("cpu", "npu"):
        on_device = None if bias is None else bias.to(device)
        weights, ids = grouped_topk(None, logits.to(device), **common, e_score_correction_bias=on_device)
        order, wanted = ids.cpu().long().sort(-1), expected[1].long().sort(-1)
        assert torch.equal(order.values, wanted.values)
        torch.testing.assert_close(weights.cpu().gather(1, order.indices), expected[0].gather(1, wanted.indices))


def test_another_scoring_function_is_refused():
    from vllm_ascend.layers.routing import grouped_topk

    with pytest.raises(ValueError, match="scoring='tanh' must be one of softmax, sigmoid"):
        grouped_topk(None, torch.zeros(1, 8), 2, True, 4, 2, "tanh")


def test_experts_with_a_scale_each():
    """Gemma 4's routing, which a graph captures."""
    from vllm_ascend.layers.routing import scaled_topk

    logits, scale = torch.randn(9, 8, generator=torch.Generator().manual_seed(3)), torch.linspace(0.5, 2, 8)
    best, chosen = logits.topk(3)
    expected = best.softmax(-1) * scale[chosen]
    weights, ids = (x.cpu() for x in scaled_topk(logits.npu(), 3, scale.npu()))
    assert torch.equal(ids.long(), chosen)
    torch.testing.assert_close(weights, expected)
    graph = torch.npu.NPUGraph()
    given, factor = logits.npu(), scale.npu()
    with torch.npu.graph(graph):
        captured, _ = scaled_topk(given, 3, factor)
    given.copy_(logits.flip(0))
    graph.replay()
    torch.testing.assert_close(captured.cpu(), expected.flip(0))
