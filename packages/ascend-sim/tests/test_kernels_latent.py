# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: its cache, its prefill in chunks and their merge, against float64 mathematics."""

import math

import pytest
import torch
import torch_npu
from sim_attention import attend
from sim_bounds import FUNCTION, assert_close, bound, gamma

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
relaxed_only = pytest.mark.skipif(torch.ops.ascend_sim.strict(), reason="needs ASCEND_SIM_STRICT=0")
DTYPES = [torch.bfloat16, torch.float16, pytest.param(torch.float32, marks=relaxed_only)]
PACKED_DTYPES = [torch.bfloat16, *(pytest.param(dtype, marks=relaxed_only) for dtype in (torch.float16, torch.float32))]
RMS, ROPE = 512, 64
CAUSAL = torch.ones(2048, 2048, dtype=torch.int8).triu(1)


def latent(kv, gain, cos, sin):
    """The normalised latent and the rotated key of each token, float64, and what the rotation's roundings are relative to."""
    x, rest = kv.double().split([RMS, ROPE], -1)
    x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double()
    rest = torch.cat((rest[..., ::2], rest[..., 1::2]), -1)
    turned = torch.cat((-rest[..., ROPE // 2 :], rest[..., : ROPE // 2]), -1)
    first, second = rest * cos.double(), turned * sin.double()
    return x, first + second, first.abs() + second.abs()


def operands(batch, sequence, dtype):
    kv = torch.randn(batch, 1, sequence, RMS + ROPE).to(dtype)
    angle = torch.randn(batch, 1, sequence, ROPE // 2).repeat(1, 1, 1, 2)
    return kv, torch.randn(RMS).to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["Norm", "PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"])
def test_kv_rmsnorm_rope_cache(dtype, mode):
    batch, sequence, blocks, block = 3, 20, 7, 16
    kv, gain, cos, sin = operands(batch, sequence, dtype)
    shape = (batch, 1, 40) if mode == "Norm" else (blocks, block, 1)
    caches = [torch.zeros(*shape, size, dtype=dtype) for size in (ROPE, RMS)]
    if mode == "Norm":
        index = torch.stack([torch.randperm(40)[:sequence] for _ in range(batch)])
        slots = (index + torch.arange(batch)[:, None] * 40).flatten()
    elif "BLK" in mode:
        index = torch.randperm(blocks)[: batch * 2] * block
        slots = torch.cat([first + torch.arange(n) for first, n in zip(index, [16, 4] * batch, strict=True)])
    else:
        index = slots = torch.randperm(blocks * block)[: batch * sequence]
        index[5] = -1  # skipped
    npu = [t.npu() for t in (kv, gain, cos, sin, index, *caches)]
    results = torch_npu.npu_kv_rmsnorm_rope_cache(*npu, cache_mode=mode, is_output_kv=True)
    meta = torch_npu.npu_kv_rmsnorm_rope_cache(
        *(t.to("meta") for t in (kv, gain, cos, sin, index, *caches)), cache_mode=mode, is_output_kv=True
    )
    assert [(r.shape, r.dtype) for r in results] == [(m.shape, m.dtype) for m in meta]
    x, key, magnitude = latent(kv, gain, cos, sin)
    assert_close(results[2], key, bound(key, dtype, steps=2, magnitude=magnitude))
    assert_close(
        results[3], x, bound(x, dtype, steps=RMS / 2 + FUNCTION + 5)
    )  # a sum of positive squares, its root, two products
    for cache, returned, rows in ((npu[5], results[0], results[2]), (npu[6], results[1], results[3])):
        assert returned.data_ptr() == cache.data_ptr()
        plain, size = cache.cpu(), rows.size(-1)
        if mode.endswith("NZ"):
            plain = plain.view(blocks, size // 16, block, 16).transpose(1, 2)
        expected = torch.zeros(plain.numel() // size, size, dtype=dtype)
        expected[slots[slots >= 0]] = rows.cpu().reshape(-1, size)[slots >= 0]
        assert torch.equal(plain.reshape(-1, size), expected)
    quiet = torch_npu.npu_kv_rmsnorm_rope_cache(*npu, cache_mode=mode)
    assert not quiet[2].any()


def test_cache_rejections():
    kv, gain, cos, sin = operands(1, 4, torch.bfloat16)
    caches = [torch.zeros(2, 16, 1, size).bfloat16().npu() for size in (ROPE, RMS)]

    def run(index=None, mode="PA", x=kv, **options):
        index = torch.arange(4) if index is None else index
        return torch_npu.npu_kv_rmsnorm_rope_cache(
            x.npu(), gain.npu(), cos.npu(), sin.npu(), index.npu(), *caches, cache_mode=mode, **options
        )

    run()
    with pytest.raises(RuntimeError, match=r"cache_mode must be 'Norm', .*got 'Paged'"):
        run(mode="Paged")
    with pytest.raises(RuntimeError, match="index must lie below 32, got 32"):
        run(torch.arange(29, 33))
    with pytest.raises(RuntimeError, match="index must hold 4 numbers with cache_mode PA, got 3"):
        run(torch.arange(3))
    with pytest.raises(RuntimeError, match="index must be int64, got Int"):
        run(torch.arange(4, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="quantised caches and v are not simulated"):
        run(c_kv_scale=torch.ones(RMS).npu())


def partial(query, query_rope, keys, causal, scale):
    """Attention of [T, N, D] over (key, key_rope, value)."""
    q, k = torch.cat((query, query_rope), -1), torch.cat(keys[:2], -1)
    hidden = torch.ones(len(q), len(k)).triu(1 + len(k) - len(q)).bool() if causal else None
    return attend(q, k, keys[2], scale, hidden)


def assert_lse(lse, expected):
    assert_close(lse, expected.lse, expected.lse_error + bound(expected.lse, torch.float32, steps=0))


@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
def test_chunked_prefill_merges_to_the_whole(dtype):
    """Keys of 128 + 64 columns, as many heads of keys as of queries; a context chunk and the causal new tokens, merged."""
    tokens, context, heads, scale = [9, 1, 30], [17, 40, 3], 4, 0.1
    sizes = (128, 64, 128)  # key, key_rope, value
    query, query_rope = (torch.randn(sum(tokens), heads, size).to(dtype) for size in (128, 64))
    chunks = [[torch.randn(sum(n), heads, size).to(dtype) for size in sizes] for n in (context, tokens)]
    parts = []
    for (key, key_rope, value), lengths, mode in zip(chunks, (context, tokens), (0, 3), strict=True):
        parts.append(
            torch_npu.npu_fused_infer_attention_score_v2(
                query.npu(), key.npu(), value.npu(), query_rope=query_rope.npu(), key_rope=key_rope.npu(),
                input_layout="TND", num_query_heads=heads, num_key_value_heads=heads, softmax_scale=scale, sparse_mode=mode,
                atten_mask=CAUSAL.npu() if mode else None, return_softmax_lse=True,
                actual_seq_qlen=torch.tensor(tokens).cumsum(0).tolist(),
                actual_seq_kvlen=torch.tensor(lengths).cumsum(0).tolist(),
            )
        )  # fmt: skip
    out, lse = torch_npu.npu_attention_update(
        [lse.flatten() for _, lse in parts], [out.reshape(-1, 128) for out, _ in parts], 1
    )
    for b in range(len(tokens)):
        mine = [t.split(tokens)[b] for t in (query, query_rope)]
        keys = [[t.split(n)[b] for t in chunk] for chunk, n in zip(chunks, (context, tokens), strict=True)]
        expected = [partial(*mine, pieces, causal, scale) for pieces, causal in zip(keys, (False, True), strict=True)]
        for (part, part_lse), one in zip(parts, expected, strict=True):
            assert_close(part.split(tokens)[b], one.out, one.allowed(dtype))
            assert_lse(part_lse.split(tokens)[b][..., 0], one)
        whole = partial(*mine, [torch.cat(pair) for pair in zip(*keys, strict=True)], True, scale)
        # Each part was stored in its dtype, and comes in with its share of the whole; the shares have the error of both sums.
        shares = [(one.lse.where(one.lse.isfinite(), -math.inf) - whole.lse).exp()[..., None] for one in expected]
        merged = bound(whole.out, dtype, steps=0)
        for share, one in zip(shares, expected, strict=True):
            error = (
                gamma(2 * FUNCTION + 8)
                + 2
                * (one.lse_error + whole.lse_error + gamma(4) * (one.lse - whole.lse).nan_to_num(0, 0, 0).abs())[
                    ..., None
                ]
            )
            merged += share * (one.allowed(dtype) + error * one.out.abs())
        assert_close(out.view(-1, heads, 128).split(tokens)[b], whole.out, merged)
        most = torch.stack([one.lse_error for one in expected]).amax(0)
        allowed = most + whole.lse_error + bound(whole.lse, torch.float32, steps=2 * FUNCTION + 4)
        assert_close(lse.view(-1, heads).split(tokens)[b], whole.lse, allowed)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", [0, 1])
def test_attention_update(dtype, kind):
    lse, rows = [torch.randn(11) * 20 for _ in range(3)], [torch.randn(11, 40).to(dtype) for _ in range(3)]
    lse[1][4] = math.inf  # the part saw nothing
    for part in lse:
        part[7] = math.inf
    results = torch_npu.npu_attention_update([t.npu() for t in lse], [t.npu() for t in rows], kind)
    meta = torch_npu.npu_attention_update([t.to("meta") for t in lse], [t.to("meta") for t in rows], kind)
    assert [(r.shape, r.dtype) for r in results] == [(m.shape, m.dtype) for m in meta]
    exact = torch.stack(lse).double().masked_fill(torch.stack(lse).isinf(), -math.inf)
    total = exact.logsumexp(0)
    weights = (exact - total).exp().nan_to_num(0)
    expected = (weights[..., None] * torch.stack(rows).double()).sum(0)
    # exp of a difference that was rounded, three products and their sum, the sum of weights, and a division.
    below = (exact - exact.amax(0)).abs().nan_to_num(0, 0, 0).amax(0)
    magnitude = (weights[..., None] * torch.stack(rows).double().abs()).sum(0)
    steps = 2 * (FUNCTION + below[:, None]) + 8
    assert_close(results[0], expected, bound(expected, dtype, steps=steps, magnitude=magnitude))
    if kind:
        sums = total.masked_fill(total.isinf(), math.inf)
        magnitude = exact.amax(0).abs().nan_to_num(0, 0, 0) + 1 + sums.abs().nan_to_num(0, 0, 0)
        assert_close(results[1], sums, bound(sums, torch.float32, steps=2 * FUNCTION + below + 4, magnitude=magnitude))


def test_attention_update_rejections():
    lse, rows = torch.zeros(4).npu(), torch.zeros(4, 8).npu()
    for message, arguments in {
        "lists of one length, got 1 and 2": ([lse], [rows, rows], 0),
        "update_type must be 0 or 1, got 2": ([lse], [rows], 2),
        "lse must be float32 with 1 dimension": ([lse.half()], [rows], 0),
        r"local_out must be \[4, size\]": ([lse], [rows[:3]], 0),
    }.items():
        with pytest.raises(RuntimeError, match=f"npu_attention_update: .*{message}"):
            torch_npu.npu_attention_update(*arguments)
