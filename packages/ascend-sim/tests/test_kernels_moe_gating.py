# SPDX-License-Identifier: Apache-2.0
"""Routing kernels against float64 mathematics, one token at a time, and torch_npu's own meta functions."""

import math

import pytest
import torch
import torch_npu
from sim_bounds import FUNCTION, assert_close, bound, gamma

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
strict_only = pytest.mark.skipif(not torch.ops.ascend_sim.strict(), reason="ASCEND_SIM_STRICT=0")


def like_meta(results, kernel, *args, **kwargs):
    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    expected = kernel(*map(meta, args), **{name: meta(value) for name, value in kwargs.items()})
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]


def top(values, count):
    """Places of the largest, largest first; of equals the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def scored(logits, sigmoid):
    """The scores of one token in float64 and their relative error in float32: exp of a difference from the largest, a sum of exponentials, a division."""
    row = logits.double()
    if sigmoid:
        return row.sigmoid(), gamma(FUNCTION + 3).expand(len(row))
    return row.softmax(0), gamma(2 * (FUNCTION + len(row) + (row.max() - row).max()) + 2).expand(len(row))


def route(logits, k, bias=None, groups=1, kept=1, sum_of_two=False, sigmoid=False):
    """One token: what the choice is made by, -inf for closed groups; how far float32 may be from it; the margin by which the groups were chosen."""
    scores, relative = scored(logits, sigmoid)
    choice = scores if bias is None else scores + bias.double()
    error = (scores * relative + gamma(1) * choice.abs()).max().item()
    margin = math.inf
    if groups > 1:
        parts = choice.view(groups, -1)
        worth = (parts.topk(2).values.sum(1) if sum_of_two else parts.amax(1)).tolist()
        keep = top(worth, kept)
        margin = min(worth[i] for i in keep) - max(worth[i] for i in range(groups) if i not in keep)
        closed = torch.tensor([i not in keep for i in range(groups)]).repeat_interleave(parts.size(1))
        choice = choice.masked_fill(closed, -math.inf)
    return choice, error, margin


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("experts", "k", "groups", "kept", "sum_of_two"),
    [(8, 2, 1, 1, False), (8, 8, 1, 1, True), (64, 6, 8, 3, False), (256, 8, 8, 4, True), (12, 5, 3, 2, True)],
)
def test_gating_top_k(dtype, sigmoid, biased, experts, k, groups, kept, sum_of_two):
    logits = torch.randn(37, experts).to(dtype)
    bias = torch.rand(experts).to(dtype) if biased else None
    options = {
        "k_group": kept,
        "group_count": groups,
        "group_select_mode": int(sum_of_two),
        "norm_type": int(sigmoid),
        "out_flag": True,
        "routed_scaling_factor": 2.5,
    }
    results = torch_npu.npu_moe_gating_top_k(logits.npu(), k, bias=None if bias is None else bias.npu(), **options)
    like_meta(results, torch_npu.npu_moe_gating_top_k, logits, k, bias=bias, **options)
    compared = 0
    for weights, ids, norm, row in zip(*(result.cpu() for result in results), logits, strict=True):
        scores, relative = scored(row, sigmoid)
        assert_close(norm, scores, bound(scores, torch.float32, steps=0) + relative * scores)
        choice, error, margin = route(row, k, bias, groups, kept, sum_of_two, sigmoid)
        assert len(set(ids.tolist())) == k
        if margin > 4 * error:  # otherwise float32 may choose another group
            best = choice[top(choice.tolist(), k)]
            assert_close(
                choice[ids.long()], best, torch.full_like(best, 2 * error)
            )  # neighbours within float32's error may change places
            compared += 1
        expected, change = scores[ids.long()] * 2.5, relative[0] + gamma(1)
        if sigmoid:
            expected, change = expected / scores[ids.long()].sum(), 2 * relative[0] + gamma(k + 4)
        assert_close(weights, expected, bound(expected, dtype, steps=0) + change * expected)
    assert compared > len(logits) / 2


def test_ties_go_to_the_first_expert_and_group():
    logits = torch.zeros(2, 12)
    logits[1, [5, 7, 11]] = 1
    _, ids, _ = torch_npu.npu_moe_gating_top_k(logits.npu(), 4)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 7, 11, 0]]
    _, ids, _ = torch_npu.npu_moe_gating_top_k(logits.npu(), 4, k_group=2, group_count=4, group_select_mode=1)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 7, 3, 4]]


def test_the_bias_chooses_and_does_not_weigh():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 5.0])
    weights, ids, _ = torch_npu.npu_moe_gating_top_k(logits.npu(), 2, bias=bias.npu())
    assert ids.tolist() == [[3, 0]]
    expected = logits.double().softmax(1)[:, [3, 0]]
    assert_close(weights, expected, bound(expected, torch.float32, steps=2 * (FUNCTION + 4 + 3) + 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(13, 6), (3, 5, 40)])
def test_gating_top_k_softmax(dtype, shape):
    x, k = torch.randn(shape).to(dtype), 4
    finished = torch.rand(shape[:-1]) < 0.3
    results = torch_npu.npu_moe_gating_top_k_softmax(x.npu(), finished.npu(), k)
    like_meta(results, torch_npu.npu_moe_gating_top_k_softmax, x, finished, k)
    weights, ids = torch.sort(x.double().softmax(-1), dim=-1, descending=True, stable=True)
    spread = (x.double().amax(-1, keepdim=True) - x.double().amin(-1, keepdim=True)).max()
    assert_close(
        results[0], weights[..., :k], bound(weights[..., :k], dtype, steps=2 * (FUNCTION + shape[-1] + spread) + 2)
    )
    assert torch.equal(results[1].cpu().long(), ids[..., :k].masked_fill(finished[..., None], shape[-1]))
    tokens = finished.numel()
    assert results[2].view(tokens, k).tolist() == [[j * tokens + t for j in range(k)] for t in range(tokens)]


def test_update_expert():
    torch.manual_seed(0)
    experts, columns, tokens, k = 9, 5, 16, 3
    table = torch.randint(0, 20, (experts, columns), dtype=torch.int32)
    table[:, 0] = torch.randint(1, columns, (experts,))
    ids = torch.randint(0, experts, (tokens, k), dtype=torch.int32)
    scales, threshold = torch.rand(tokens, k).sort(1, descending=True)[0], torch.rand(1, k) * 0.5
    active = torch.arange(tokens) < 11
    for mode, rank, world in ((0, 5, 8), (1, -1, -1)):
        options = {"local_rank_id": rank, "world_size": world, "balance_mode": mode}
        places, mask = torch_npu.npu_moe_update_expert(
            ids.npu(), table.npu(), expert_scales=scales.npu(), pruning_threshold=threshold.npu(),
            active_mask=active.npu(), **options,
        )  # fmt: skip
        like_meta((places, mask), torch_npu.npu_moe_update_expert, ids, table, **options)
        for t in range(tokens):
            for j in range(k):
                row = table[ids[t, j]].tolist()
                chosen = row[1 + (t % row[0] if mode else rank // math.ceil(world / row[0]))]
                assert places[t, j].item() == chosen
                assert mask[t, j].item() == bool(active[t] and scales[t, j] >= threshold[0, j] * scales[t].sum())
    assert torch_npu.npu_moe_update_expert(ids.npu(), table.npu(), balance_mode=1)[1].all()


def gating(x=None, k=2, **options):
    return torch_npu.npu_moe_gating_top_k((torch.zeros(3, 8) if x is None else x).npu(), k, **options)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"k must lie in \[1, .* = 4\], got 5", lambda: gating(k=5, group_count=2)),
        ("must be a multiple of group_count, got 8 and 3", lambda: gating(group_count=3)),
        ("renorm must be 0, got 1", lambda: gating(renorm=1)),
        ("norm_type must be 0 .* or 1 .*, got 2", lambda: gating(norm_type=2)),
        (r"bias must be \[experts = 8\], got \[7\]", lambda: gating(bias=torch.zeros(7).npu())),
        (r"k_group must lie in \[1, group_count = 2\], got 3", lambda: gating(group_count=2, k_group=3)),
        (
            r"k must lie in \[1, 8\], got 9",
            lambda: torch_npu.npu_moe_gating_top_k_softmax(torch.zeros(2, 8).npu(), k=9),
        ),
        (
            r"expert_ids must lie in \[0, 1\], got 2",
            lambda: torch_npu.npu_moe_update_expert(
                torch.full((1, 1), 2, dtype=torch.int32).npu(),
                torch.ones(2, 2, dtype=torch.int32).npu(),
                balance_mode=1,
            ),
        ),
    ],
)
def test_rejections(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


@strict_only
@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("bias must have the data type of x", lambda: gating(bias=torch.zeros(8, dtype=torch.float16).npu())),
        ("a group must have more than 2 experts, got 2", lambda: gating(group_count=4)),
        ("at most 2048 experts, got 2049", lambda: gating(torch.zeros(1, 2049))),
        ("times group_count must not exceed 2048", lambda: gating(torch.zeros(1, 300), group_count=100)),
    ],
)
def test_strict_rejections(message, call):
    with pytest.raises(RuntimeError, match=f"npu_moe_gating_top_k: .*{message}"):
        call()
