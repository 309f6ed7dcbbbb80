# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings against float64 mathematics and torch_npu's own meta functions."""

import pytest
import torch
import torch_npu
from sim_bounds import assert_close, bound

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
strict_only = pytest.mark.skipif(not torch.ops.ascend_sim.strict(), reason="ASCEND_SIM_STRICT=0")


def turn(x, mode):
    if mode == "half":
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotated(x, cos, sin, mode="half"):
    x, cos, sin = x.double(), cos.double(), sin.double()
    return x * cos + turn(x, mode) * sin


def assert_rotated(y, x, cos, sin, mode="half"):
    """Two products and their sum, stored once."""
    expected, magnitude = (
        rotated(x, cos, sin, mode),
        (x.double() * cos.double()).abs() + (turn(x.double(), mode) * sin.double()).abs(),
    )
    assert_close(y, expected, bound(expected, y.dtype, steps=2, magnitude=magnitude))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize(
    ("x", "r"), [((1, 7, 9, 64), (1, 7, 1, 64)), ((2, 3, 5, 128), (1, 1, 5, 128)), ((1200, 2, 3, 32), (1200, 1, 1, 32))]
)
def test_rotary_mul(dtype, mode, x, r):
    x, cos, sin = torch.randn(x, dtype=dtype), torch.randn(r, dtype=dtype), torch.randn(r, dtype=dtype)
    y = torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), mode)
    meta = torch_npu.npu_rotary_mul(x.to("meta"), cos.to("meta"), sin.to("meta"), mode)
    assert y.shape == meta.shape
    assert y.dtype == meta.dtype
    assert_rotated(y, x, cos, sin, mode)


@pytest.mark.parametrize("r", [(2, 3, 1, 16), (2, 1, 4, 16), (2, 3, 4, 16)])
def test_rotary_mul_half_takes_angles_per_batch_entry(r):
    x, cos, sin = torch.randn(2, 3, 4, 16), torch.randn(r), torch.randn(r)
    assert_rotated(torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu()), x, cos, sin)


def test_rotary_mul_of_views_and_with_a_matrix():
    x, cos, sin = torch.randn(1, 5, 3, 48), torch.randn(1, 5, 1, 16), torch.randn(1, 5, 1, 16)
    part = x.npu()[..., 16:32]
    assert_rotated(torch_npu.npu_rotary_mul(part, cos.npu(), sin.npu()), x[..., 16:32], cos, sin)
    matrix = torch.zeros(16, 16)
    matrix[:8, 8:], matrix[8:, :8] = torch.eye(8), -torch.eye(8)
    result = torch_npu.npu_rotary_mul(part, cos.npu(), sin.npu(), "half", matrix.npu())
    assert_rotated(result, x[..., 16:32], cos, sin)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["BSND", "TND"])
@pytest.mark.parametrize("size", [64, 128])
def test_apply_rotary_pos_emb_in_place(dtype, layout, size):
    lead = (2, 5) if layout == "BSND" else (7,)
    query, key = torch.randn(*lead, 9, size, dtype=dtype), torch.randn(*lead, 3, size, dtype=dtype)
    cos, sin = torch.randn(*lead, 1, size, dtype=dtype), torch.randn(*lead, 1, size, dtype=dtype)
    q, k = query.npu(), key.npu()
    results = torch_npu.npu_apply_rotary_pos_emb(q, k, cos.npu(), sin.npu(), layout)
    meta = torch_npu.npu_apply_rotary_pos_emb(*(t.to("meta") for t in (query, key, cos, sin)), layout)
    for given, now, result, shape in zip((query, key), (q, k), results, meta, strict=True):
        assert result.data_ptr() == now.data_ptr()
        assert result.shape == shape.shape
        assert result.dtype == shape.dtype
        assert_rotated(now, given, cos, sin)


def test_apply_rotary_pos_emb_of_a_slice_leaves_its_surroundings():
    both = torch.randn(4, 6, 64)
    cos, sin = torch.randn(4, 1, 64), torch.randn(4, 1, 64)
    now = both.npu()
    torch_npu.npu_apply_rotary_pos_emb(now[:, 1:3], now[:, 4:5], cos.npu(), sin.npu(), "TND")
    for part in (slice(1, 3), slice(4, 5)):
        assert_rotated(now[:, part], both[:, part], cos, sin)
    for part in (slice(0, 1), slice(3, 4), slice(5, 6)):
        assert torch.equal(now[:, part].cpu(), both[:, part])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("angles", [(2, 1, 5, 64), (2, 4, 5, 64), (2, 1, 1, 64)])
def test_interleave_rope(dtype, angles):
    x, cos, sin = (
        torch.randn(2, 4, 5, 64, dtype=dtype),
        torch.randn(angles, dtype=dtype),
        torch.randn(angles, dtype=dtype),
    )
    y = torch_npu.npu_interleave_rope(x.npu(), cos.npu(), sin.npu())
    assert y.shape == torch_npu.npu_interleave_rope(x.to("meta"), cos.to("meta"), sin.to("meta")).shape
    apart = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    assert_rotated(y, apart, cos, sin)


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize(
    ("sections", "cache_mode"), [(None, "default"), ([4, 6, 6], "default"), ([6, 5, 5], "interleave")]
)
def test_mrope(mode, sections, cache_mode):
    tokens, heads, size, rotary = 6, 3, 48, 32
    positions = torch.randint(20, (3, tokens) if sections else (tokens,))
    query, key, cache = torch.randn(tokens, heads * size), torch.randn(tokens, size), torch.randn(20, rotary)
    cos, sin = cache[positions].chunk(2, -1)
    if sections:
        which = torch.tensor([part for part, count in enumerate(sections) for _ in range(count)])
        if cache_mode == "interleave":
            which = torch.tensor([i % 3 if i % 3 and i < 3 * sections[i % 3] else 0 for i in range(rotary // 2)])
        cos, sin = (
            t.permute(1, 2, 0).gather(2, which.view(1, -1, 1).expand(tokens, -1, 1)).squeeze(2) for t in (cos, sin)
        )
    spread = (lambda t: torch.cat((t, t), -1)) if mode == "half" else (lambda t: t.repeat_interleave(2, -1))
    results = torch_npu.npu_mrope(
        positions.npu(),
        query.npu(),
        key.npu(),
        cache.npu(),
        size,
        mrope_section=sections,
        rotary_mode=mode,
        cache_mode=cache_mode,
    )
    for given, result in zip((query, key), results, strict=True):
        x = given.view(tokens, -1, size)
        y = result.cpu().view_as(x)
        assert_rotated(y[..., :rotary], x[..., :rotary], spread(cos)[:, None], spread(sin)[:, None], mode)
        assert torch.equal(y[..., rotary:], x[..., rotary:])


def test_rejections():
    x, r = torch.ones(1, 4, 2, 16).npu(), torch.ones(1, 3, 1, 16).npu()
    with pytest.raises(RuntimeError, match=r"npu_rotary_mul: cos and sin of shape .1, 3, 1, 16. do not broadcast"):
        torch_npu.npu_rotary_mul(x, r, r)
    with pytest.raises(RuntimeError, match="npu_rotary_mul: rotary_mode must be 'half' or 'interleave', got 'quarter'"):
        torch_npu.npu_rotary_mul(x, x, x, "quarter")
    with pytest.raises(RuntimeError, match="npu_apply_rotary_pos_emb: dimension 0 of key must equal query's 4, got 3"):
        torch_npu.npu_apply_rotary_pos_emb(*(torch.ones(n, 1, 64).npu() for n in (4, 3, 4, 4)), "TND")


@strict_only
def test_strict_rejections():
    x, r = torch.ones(2, 3, 4, 16).npu(), torch.ones(1, 3, 4, 16).npu()
    with pytest.raises(RuntimeError, match=r"npu_rotary_mul: r1 .* is none of the documented layouts"):
        torch_npu.npu_rotary_mul(x, r, r)
    with pytest.raises(RuntimeError, match="npu_apply_rotary_pos_emb: D must be 64 or 128, got 96"):
        torch_npu.npu_apply_rotary_pos_emb(*(torch.ones(4, 1, 96).npu() for _ in range(4)), "TND")
    with pytest.raises(RuntimeError, match="rotary_mode must be 'half', got 'interleave'"):
        torch_npu.npu_apply_rotary_pos_emb(*(torch.ones(4, 1, 64).npu() for _ in range(4)), "TND", "interleave")
