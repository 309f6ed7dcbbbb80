# SPDX-License-Identifier: Apache-2.0
"""Fused attention, both versions, against float64 mathematics request by request, and torch_npu's own meta function."""

import pytest
import torch
import torch_npu
from sim_attention import attend
from sim_bounds import assert_close, bound

relaxed_only = pytest.mark.skipif(torch.ops.ascend_sim.strict(), reason="needs ASCEND_SIM_STRICT=0")
DTYPES = [torch.bfloat16, torch.float16, pytest.param(torch.float32, marks=relaxed_only)]
PACKED_DTYPES = [torch.bfloat16, *(pytest.param(dtype, marks=relaxed_only) for dtype in (torch.float16, torch.float32))]
COMPRESSED = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
attention = torch_npu.npu_fused_infer_attention_score
# Query tokens and keys of each request: one token, decode, chunked prefill, across blocks, a request without keys.
MIXES = [
    ([1], [1]),
    ([1, 1, 1], [5, 128, 257]),
    ([3, 1, 40, 0, 5], [3, 90, 300, 20, 129]),
    ([300], [411]),
    ([1, 17, 2], [0, 17, 64]),
]


def unseen(tokens, keys, mode, before=2**31 - 1, after=2**31 - 1):
    """True where a query token does not see a key."""
    i, j = torch.arange(tokens)[:, None], torch.arange(keys)[None]
    if mode in (3, 4):
        i = i + keys - tokens
    if mode in (2, 3):
        before, after = 2**31 - 1, 0
    return (j < i - before) | (j > i + after)


def paged(lengths, heads, size, block, dtype, flat=True):
    """A cache of shuffled blocks: the kernel's tensor, the block table, and each request's [S, heads, size]."""
    counts = [-(-length // block) for length in lengths]
    cache = torch.randn(sum(counts) + 2, block, heads, size).to(dtype)
    ids = iter(torch.randperm(len(cache)).tolist())
    table = torch.full(
        (len(lengths), max([1, *counts])), -7, dtype=torch.int32
    )  # entries after a request's blocks are never read
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([next(ids) for _ in range(count)], dtype=torch.int32)
    rows = [cache[table[b, : counts[b]].long()].flatten(0, 1)[: lengths[b]] for b in range(len(lengths))]
    return (cache.flatten(2) if flat else cache.transpose(1, 2).contiguous()), table, rows


def pages_like(cache, flat, table, lengths, block):
    plain = cache.view(cache.size(0), block, -1) if flat else cache.transpose(1, 2)
    heads = 1 if flat else cache.size(1)
    plain = plain.reshape(cache.size(0), block, heads, -1)
    return [plain[table[b, : -(-n // block)].long()].flatten(0, 1)[:n] for b, n in enumerate(lengths)]


def assert_attends(result, lse, expected):
    """The result `[T, N, V]` and the log-sum-exp `[T, N, 1]` of all requests together."""
    assert_close(result, torch.cat([e.out for e in expected]), torch.cat([e.allowed(result.dtype) for e in expected]))
    sums = torch.cat([e.lse for e in expected])
    assert_close(lse.squeeze(-1), sums, torch.cat([e.lse_error for e in expected]) + bound(sums, lse.dtype, steps=0))


@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), MIXES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block", "flat"),
    [
        (9, 3, 64, 128, True),
        (8, 1, 128, 256, False),
        (4, 4, 192, 128, True),
        (14, 2, 256, 384, False),
        pytest.param(4, 4, 80, 32, True, marks=relaxed_only),
        pytest.param(14, 2, 16, 48, False, marks=relaxed_only),
    ],
)
def test_paged_causal(dtype, queries, keys, heads, kv_heads, size, block, flat):
    key, table, key_rows = paged(keys, kv_heads, size, block, dtype, flat)
    value = torch.randn_like(key)
    value_plain = (value if flat else value.transpose(1, 2)).reshape(len(value), block, kv_heads, size)
    value_rows = [value_plain[table[b, : -(-n // block)].long()].flatten(0, 1)[:n] for b, n in enumerate(keys)]
    query = torch.randn(sum(queries), heads, size).to(dtype)
    ends = torch.tensor(queries).cumsum(0).tolist()
    options = {
        "input_layout": "TND",
        "block_size": block,
        "actual_seq_lengths": ends,
        "actual_seq_lengths_kv": keys,
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": size**-0.5,
        "sparse_mode": 3,
        "softmax_lse_flag": True,
    }
    result, lse = attention(
        query.npu(), key.npu(), value.npu(), atten_mask=COMPRESSED.npu(), block_table=table.npu(), **options
    )
    meta = attention(
        *(t.to("meta") for t in (query, key, value)),
        atten_mask=COMPRESSED.to("meta"),
        block_table=table.to("meta"),
        **options,
    )
    assert (result.shape, result.dtype, lse.shape, lse.dtype) == (
        meta[0].shape,
        meta[0].dtype,
        meta[1].shape,
        meta[1].dtype,
    )
    expected = [
        attend(q, k, v, size**-0.5, unseen(len(q), len(k), 3))
        for q, k, v in zip(query.split(queries), key_rows, value_rows, strict=True)
    ]
    assert_attends(result, lse, expected)


@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (11, 0), (200, 0), (7, 3)])
def test_paged_sliding_window(dtype, before, after):
    queries, keys = [1, 2, 40, 300], [90, 64, 70, 300]
    cache, table, rows = paged(keys, 2, 64, 128, dtype)
    query = torch.randn(sum(queries), 4, 64).to(dtype)
    result, lse = attention(
        query.npu(),
        cache.npu(),
        cache.npu(),
        atten_mask=COMPRESSED.npu(),
        block_table=table.npu(),
        input_layout="TND",
        block_size=128,
        actual_seq_lengths=torch.tensor(queries).cumsum(0).tolist(),
        actual_seq_lengths_kv=keys,
        num_heads=4,
        num_key_value_heads=2,
        scale=0.125,
        sparse_mode=4,
        pre_tokens=before,
        next_tokens=after,
        softmax_lse_flag=True,
    )
    expected = [
        attend(q, k, k, 0.125, unseen(len(q), len(k), 4, before, after))
        for q, k in zip(query.split(queries), rows, strict=True)
    ]
    assert_attends(result, lse, expected)


@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
@pytest.mark.parametrize("mode", [0, 2, 3])
@pytest.mark.parametrize("layout", ["TND", "NTD_TND", "TND_NTD"])
def test_dense_packed(dtype, mode, layout):
    queries, keys = [5, 1, 30, 0], [5, 9, 40, 3]
    query, key, value = (torch.randn(n, h, d).to(dtype) for n, h, d in ((36, 6, 192), (57, 2, 192), (57, 2, 128)))
    given = [t.transpose(0, 1).contiguous() if layout == "NTD_TND" else t for t in (query, key, value)]
    result, lse = attention(
        *(t.npu() for t in given),
        atten_mask=COMPRESSED.npu() if mode else None,
        input_layout=layout,
        num_heads=6,
        num_key_value_heads=2,
        actual_seq_lengths=torch.tensor(queries).cumsum(0).tolist(),
        actual_seq_lengths_kv=torch.tensor(keys).cumsum(0).tolist(),
        scale=0.2,
        sparse_mode=mode,
        softmax_lse_flag=True,
    )
    expected = [
        attend(q, k, v, 0.2, unseen(len(q), len(k), mode))
        for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    ]
    assert_attends(result.transpose(0, 1) if layout == "TND_NTD" else result, lse, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
@pytest.mark.parametrize("tokens", [2, 33])
def test_batched_with_lengths(dtype, layout, tokens):
    batch, heads, size = 3, 4, 32
    plain = [torch.randn(batch, n, h, size).to(dtype) for n, h in ((tokens, heads), (40, 2), (40, 2))]
    lengths, kv_lengths = [tokens, 1, tokens - 1], [40, 7, 33]
    given = [
        t.flatten(2) if layout == "BSH" else t if layout == "BSND" else t.transpose(1, 2).contiguous() for t in plain
    ]
    options = {
        "actual_seq_lengths": lengths,
        "actual_seq_lengths_kv": kv_lengths,
        "input_layout": layout,
        "num_heads": heads,
        "num_key_value_heads": 2,
        "scale": 0.3,
        "softmax_lse_flag": True,
    }
    result, lse = attention(*(t.npu() for t in given), **options)
    meta = attention(*(t.to("meta") for t in given), **options)
    assert result.shape == meta[0].shape
    assert lse.shape == meta[1].shape
    result = result.cpu().view(batch, tokens, heads, size) if layout != "BNSD" else result.cpu().transpose(1, 2)
    for b in range(batch):
        q, k, v = plain[0][b, : lengths[b]], plain[1][b, : kv_lengths[b]], plain[2][b, : kv_lengths[b]]
        assert_attends(result[b, : lengths[b]], lse[b, :, : lengths[b]].transpose(0, 1), [attend(q, k, v, 0.3)])
        assert not result[b, lengths[b] :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 6, 10), (1, 1, 6, 10), (1, 6, 10), (6, 10)])
def test_whole_mask(dtype, shape):
    query, key = torch.randn(2, 4, 6, 32).to(dtype), torch.randn(2, 4, 10, 32).to(dtype)
    mask = torch.rand(shape) < 0.4
    mask[..., 3, :] = True  # a row that sees nothing
    result, _ = attention(
        query.npu(), key.npu(), key.npu(), atten_mask=mask.npu(), input_layout="BNSD", num_heads=4, scale=0.2
    )
    for b in range(2):
        hidden = mask.view(-1, 6, 10).expand(2, 6, 10)[b]
        expected = attend(query[b].transpose(0, 1), key[b].transpose(0, 1), key[b].transpose(0, 1), 0.2, hidden)
        assert_close(result[b].transpose(0, 1), expected.out, expected.allowed(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [[1, 1, 1], [1, 9, 16]])
def test_latent_attention_decode(dtype, queries):
    """The rope parts are more columns of query and key; the latent cache is key and value."""
    keys, heads, block = [3, 40, 130], 16, 16
    latent, table, rows = paged(keys, 1, 512, block, dtype, flat=False)
    rope = torch.randn(latent.size(0), 1, block, 64).to(dtype)
    rope_rows = pages_like(rope, False, table, keys, block)
    query, query_rope = torch.randn(sum(queries), heads, 512).to(dtype), torch.randn(sum(queries), heads, 64).to(dtype)
    mode = 3 if max(queries) > 1 else 0
    latent_npu = latent.npu()
    result, lse = torch_npu.npu_fused_infer_attention_score_v2(
        query.npu(),
        latent_npu,
        latent_npu,
        query_rope=query_rope.npu(),
        key_rope=rope.npu(),
        atten_mask=COMPRESSED.npu() if mode else None,
        block_table=table.npu(),
        input_layout="TND",
        block_size=block,
        actual_seq_qlen=torch.tensor(queries).cumsum(0).tolist(),
        actual_seq_kvlen=keys,
        num_query_heads=heads,
        num_key_value_heads=1,
        softmax_scale=0.04,
        sparse_mode=mode,
        return_softmax_lse=True,
    )
    whole = torch.cat((query, query_rope), -1).split(queries)
    expected = [
        attend(q, torch.cat((k, r), -1), k, 0.04, unseen(len(q), len(k), mode))
        for q, k, r in zip(whole, rows, rope_rows, strict=True)
    ]
    assert_attends(result, lse, expected)


@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
@pytest.mark.parametrize("queries", [[1, 2], [9, 30]])
def test_sinks(dtype, queries):
    keys = [70, 33]
    cache, table, rows = paged(keys, 2, 64, 128, dtype)
    query, sink = torch.randn(sum(queries), 4, 64).to(dtype), torch.randn(4, dtype=torch.bfloat16)
    result, lse = torch_npu.npu_fused_infer_attention_score_v2(
        query.npu(),
        cache.npu(),
        cache.npu(),
        atten_mask=COMPRESSED.npu(),
        block_table=table.npu(),
        learnable_sink=sink.npu(),
        actual_seq_qlen=torch.tensor(queries).cumsum(0).tolist(),
        actual_seq_kvlen=keys,
        num_query_heads=4,
        num_key_value_heads=2,
        softmax_scale=0.125,
        input_layout="TND",
        sparse_mode=3,
        block_size=128,
        return_softmax_lse=True,
    )
    expected = [
        attend(q, k, k, 0.125, unseen(len(q), len(k), 3), sink) for q, k in zip(query.split(queries), rows, strict=True)
    ]
    assert_attends(result, lse, expected)


def test_many_queries_go_in_blocks():
    """More query tokens than one block of the matrix products, more keys than the compressed mask has rows."""
    query, key = (torch.randn(n, 2, 64, dtype=torch.bfloat16) for n in (700, 2500))
    result, lse = attention(
        query.npu(),
        key.npu(),
        key.npu(),
        atten_mask=COMPRESSED.npu(),
        input_layout="TND",
        num_heads=2,
        scale=0.25,
        sparse_mode=3,
        actual_seq_lengths=[700],
        actual_seq_lengths_kv=[2500],
        softmax_lse_flag=True,
    )
    assert_attends(result, lse, [attend(query, key, key, 0.25, unseen(700, 2500, 3))])


def test_calls_and_flops_are_counted():
    torch.ops.ascend_sim.reset_counts()
    x = torch.ones(1, 2, 3, 16, dtype=torch.bfloat16).npu()
    attention(x, x, x, input_layout="BNSD", num_heads=2)
    names, calls, flops = torch.ops.ascend_sim.counts()
    at = names.index("npu::npu_fused_infer_attention_score")
    assert (calls[at], flops[at]) == (1, 2 * 2 * (3 * 3) * 2 * 16)


def call(**changes):
    """A valid paged decode call of two requests in bfloat16, with changes."""
    cache = torch.zeros(4, 16, 2 * 64, dtype=torch.bfloat16).npu()
    arguments = {
        "query": torch.zeros(2, 4, 64, dtype=torch.bfloat16).npu(),
        "key": cache,
        "value": cache,
        "atten_mask": COMPRESSED.npu(),
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32).npu(),
        "input_layout": "TND",
        "block_size": 16,
        "actual_seq_lengths": [1, 2],
        "actual_seq_lengths_kv": [20, 30],
        "num_heads": 4,
        "num_key_value_heads": 2,
        "sparse_mode": 3,
    }
    return attention(**(arguments | changes))


REJECTIONS = {
    "argument pse_shift is not simulated": {"pse_shift": torch.zeros(1)},
    "argument antiquant_mode is not simulated": {"antiquant_mode": 1},
    "input_layout 'TDN' is not one of": {"input_layout": "TDN"},
    "sparse_mode must be 0, 1, 2, 3 or 4": {"sparse_mode": 9},
    "needs the compressed atten_mask of 2048 x 2048": {"atten_mask": None},
    "atten_mask of sparse_mode 3 must be .2048, 2048.": {"atten_mask": COMPRESSED[:30, :30]},
    "takes no atten_mask": {"sparse_mode": 0},
    "atten_mask must be bool, int8 or uint8, got BFloat16": {"atten_mask": COMPRESSED.bfloat16()},
    "actual_seq_lengths must be cumulative lengths": {"actual_seq_lengths": [2, 1]},
    "too few for actual_seq_lengths_kv.1. = 33": {"actual_seq_lengths_kv": [20, 33]},
    r"block_table\[1\]\[1\] must lie in \[0, 3\], got 4": {
        "block_table": torch.tensor([[0, 1], [2, 4]], dtype=torch.int32)
    },
    "must be a multiple of num_key_value_heads, got 4 and 3": {"num_key_value_heads": 3},
    "query_rope and key_rope must be given together": {"query_rope": torch.zeros(2, 4, 64, dtype=torch.bfloat16)},
    "actual_seq_lengths_kv is required with a block_table": {"actual_seq_lengths_kv": None},
}


@pytest.mark.parametrize(("message", "changes"), REJECTIONS.items(), ids=REJECTIONS)
def test_rejections(message, changes):
    with pytest.raises(RuntimeError, match=f"npu_fused_infer_attention_score: .*{message}"):
        call(**{name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in changes.items()})
