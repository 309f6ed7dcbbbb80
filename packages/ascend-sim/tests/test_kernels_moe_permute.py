# SPDX-License-Identifier: Apache-2.0
"""Sorting tokens by expert and back: against plain loops, and torch_npu's own meta functions."""

import pytest
import torch
import torch_npu
from sim_bounds import assert_close, assert_quantised, bound, gamma
from sim_memory import is_unwritten

strict_only = pytest.mark.skipif(not torch.ops.ascend_sim.strict(), reason="ASCEND_SIM_STRICT=0")
relaxed_only = pytest.mark.skipif(torch.ops.ascend_sim.strict(), reason="float32 needs ASCEND_SIM_STRICT=0")
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def like_meta(results, kernel, *args, **kwargs):
    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    expected = kernel(*map(meta, args), **{name: meta(value) for name, value in kwargs.items()})
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]


def pairs(ids, first, last):
    """(place, expert) of the choices within a range of experts, in expert order."""
    flat = list(enumerate(ids.flatten().tolist()))
    return sorted(((p, e) for p, e in flat if first <= e < last), key=lambda pair: (pair[1], pair[0]))


def init_routing(x, ids, experts, **options):
    options = {
        "active_num": -1,
        "expert_num": experts,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
    } | options
    npu = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    results = torch_npu.npu_moe_init_routing_v2(x.npu(), ids.npu(), **npu)
    like_meta(results, torch_npu.npu_moe_init_routing_v2, x, ids, **options)
    return [result.cpu() for result in results]


CASES = {  # tokens, experts, k, range
    "all experts": (9, 6, 3, None),
    "a range": (17, 8, 2, [2, 5]),
    "one token": (1, 4, 4, [0, 2]),
    "none here": (5, 8, 1, [6, 7]),
    "no tokens": (0, 4, 2, [0, 4]),
}


def chosen(name):
    tokens, experts, k, active = CASES[name]
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k].int()
    if name == "none here":
        ids.fill_(3)
    return ids, experts, active or [0, experts]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_init_routing(dtype, name):
    ids, experts, (first, last) = chosen(name)
    x = torch.randint(-9, 9, (len(ids), 11)).to(dtype)
    scale = torch.rand(len(ids))
    sorted_pairs, k = pairs(ids, first, last), ids.size(1)
    out, rows, counts, scales = init_routing(x, ids, experts, active_expert_range=[first, last], scale=scale)
    for i, (place, _) in enumerate(sorted_pairs):
        assert torch.equal(out[i], x[place // k])
        assert scales[i] == scale[place // k]
    assert is_unwritten(out[len(sorted_pairs) :])
    assert is_unwritten(scales[len(sorted_pairs) :])
    row_of = {place: i for i, (place, _) in enumerate(sorted_pairs)}
    assert rows.tolist() == [row_of.get(place, -1) for place in range(ids.numel())]
    assert counts.tolist() == [sum(e == expert for _, e in sorted_pairs) for expert in range(first, last)]
    _, scattered, table, _ = init_routing(
        x, ids, experts, active_expert_range=[first, last], row_idx_type=1, expert_tokens_num_type=2
    )
    assert scattered[: len(sorted_pairs)].tolist() == [place for place, _ in sorted_pairs]
    assert is_unwritten(scattered[len(sorted_pairs) :])
    present = [[first + e, n] for e, n in enumerate(counts.tolist()) if n]
    assert table.tolist() == present + [[0, 0]] * (experts - len(present))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("smooth", [None, "one", "each"])
def test_init_routing_quantises(dtype, smooth):
    ids, experts, (first, last) = chosen("a range")
    x = torch.randn(len(ids), 33).to(dtype)
    x[2] = 0
    scale = {None: None, "one": torch.rand(1, 33) + 0.5, "each": torch.rand(last - first, 33) + 0.5}[smooth]
    out, _, _, scales = init_routing(x, ids, experts, active_expert_range=[first, last], quant_mode=1, scale=scale)
    for i, (place, expert) in enumerate(pairs(ids, first, last)):
        row = x[place // ids.size(1)].double()
        if scale is not None:
            row = row * scale[expert - first if smooth == "each" else 0].double()
        assert_quantised(out[i : i + 1], scales[i : i + 1], row[None], gamma(1) * row[None].abs())


def test_init_routing_limits_the_rows():
    ids, experts, _ = chosen("all experts")
    x = torch.randn(len(ids), 4)
    whole = init_routing(x, ids, experts)
    part = init_routing(x, ids, experts, active_num=7)
    assert torch.equal(part[0], whole[0][:7])
    assert torch.equal(part[1], whole[1])
    assert torch.equal(part[2], whole[2])


@pytest.mark.skipif(torch.ops.ascend_sim.strict(), reason="cumulative counts need ASCEND_SIM_STRICT=0")
def test_init_routing_cumulative_counts_beyond_float32():
    ids, experts, active = chosen("a range")
    x = torch.zeros(len(ids), 4)
    counts, sums = (
        init_routing(x, ids, experts, active_expert_range=active, expert_tokens_num_type=kind)[2] for kind in (1, 0)
    )
    assert torch.equal(sums, counts.cumsum(0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("limit", [None, 0, 5, 1000, -4])
@pytest.mark.parametrize("k", [1, 3])
def test_permute_and_back(dtype, limit, k):
    ids = torch.rand(8, 6).argsort(1)[:, :k]
    if k == 1:
        ids = ids.flatten().int()
    tokens = torch.randn(8, 10).to(dtype)
    results = torch_npu.npu_moe_token_permute(tokens.npu(), ids.npu(), limit)
    like_meta(results, torch_npu.npu_moe_token_permute, tokens, ids, limit)
    permuted, where = (result.cpu() for result in results)
    order = pairs(ids, 0, 6)
    for i, (place, _) in enumerate(order):
        assert where[place] == i
        assert i >= len(permuted) or torch.equal(permuted[i], tokens[place // k])
    probs = torch.rand(8, k).to(dtype)
    back = torch_npu.npu_moe_token_unpermute(results[0], results[1], probs.npu())
    like_meta((back,), lambda *args: (torch_npu.npu_moe_token_unpermute(*args),), permuted, where, probs)
    kept = torch.tensor([[where[t * k + j] < len(permuted) for j in range(k)] for t in range(8)])
    expected = tokens.double() * (probs.double() * kept).sum(1, keepdim=True)
    assert_close(back, expected, bound(expected, dtype, steps=2 * k))  # all addends have the token's sign
    if k == 1:
        plain = torch_npu.npu_moe_token_unpermute(*results).cpu()
        assert torch.equal(plain, tokens * kept)


def test_unpermute_of_a_range_of_experts():
    """Production code's way: a pair without a row takes any other row with weight zero."""
    ids, experts, (first, last) = chosen("a range")
    x, probs = torch.randn(len(ids), 6), torch.rand(ids.shape)
    rows, where, _, _ = init_routing(x, ids, experts, active_expert_range=[first, last])
    here = (ids >= first) & (ids < last)
    back = torch_npu.npu_moe_token_unpermute((rows * 3).npu(), where.abs().npu(), (probs * here).npu())
    expected = x.double() * 3 * (probs.double() * here).sum(1, keepdim=True)
    assert_close(back, expected, bound(expected, torch.float32, steps=1 + 2 * ids.size(1)))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.int8, pytest.param(torch.float32, marks=relaxed_only)], ids=str
)
@pytest.mark.parametrize("counts", [torch.int32, torch.int64], ids=str)
def test_re_routing(dtype, counts):
    numbers = torch.tensor([[2, 0, 3], [1, 4, 0]])
    experts = [e for row in numbers.tolist() for e, n in enumerate(row) for _ in range(n)]
    tokens, scales = torch.randint(-99, 99, (10, 5)).to(dtype), torch.rand(10)
    results = torch_npu.npu_moe_re_routing(tokens.npu(), numbers.to(counts).npu(), per_token_scales=scales.npu())
    like_meta(results, torch_npu.npu_moe_re_routing, tokens, numbers.to(counts), per_token_scales=scales)
    order = sorted(range(10), key=lambda i: (experts[i], i))
    assert torch.equal(results[0].cpu(), tokens[order])
    assert torch.equal(results[1].cpu(), scales[order])
    assert results[2].tolist() == order
    assert results[3].tolist() == [3, 4, 3]


IDS = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)


def routing(**options):
    return init_routing(torch.zeros(2, 4, dtype=torch.bfloat16), options.pop("ids", IDS), 3, **options)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("init_routing_v2: drop_pad_mode must be 0", lambda: routing(drop_pad_mode=1)),
        ("init_routing_v2: quant_mode must be -1 .* or 1 .*, got 0", lambda: routing(quant_mode=0)),
        (r"active_expert_range must be .* expert_num = 3\), got \[1, 4\]", lambda: routing(active_expert_range=[1, 4])),
        (r"scale must be \[tokens = 2\]", lambda: routing(scale=torch.zeros(3))),
        ("padded_mode must be False", lambda: torch_npu.npu_moe_token_permute(torch.zeros(2, 4).npu(), IDS.npu(), None, True)),
        (
            r"sorted_indices must lie in \[0, 1\], got -1",
            lambda: torch_npu.npu_moe_token_unpermute(torch.zeros(2, 4).npu(), torch.tensor([0, -1], dtype=torch.int32).npu()),
        ),
        ("must add up to the 2 tokens, got 3", lambda: torch_npu.npu_moe_re_routing(torch.zeros(2, 4).bfloat16().npu(), IDS.npu())),
    ],
)  # fmt: skip
def test_rejections(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


@strict_only
@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"expert_tokens_num_type must be 1 \(counts\) or 2", lambda: routing(expert_tokens_num_type=0)),
        ("expert_tokens_num_flag must be True", lambda: routing(expert_tokens_num_flag=False)),
        (r"expert_idx must lie in \[0, expert_num = 3\), got 3", lambda: routing(ids=IDS + 1)),
        ("expert_idx must be int32, got Long", lambda: routing(ids=IDS.long())),
        (
            "must name each row once .* got 1 twice",
            lambda: torch_npu.npu_moe_token_unpermute(torch.zeros(2, 4).npu(), torch.tensor([1, 1], dtype=torch.int32).npu()),
        ),
        ("tokens must be float16, bfloat16 or int8, got Float", lambda: torch_npu.npu_moe_re_routing(torch.zeros(3, 4).npu(), IDS.npu())),
    ],
)  # fmt: skip
def test_strict_rejections(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()
