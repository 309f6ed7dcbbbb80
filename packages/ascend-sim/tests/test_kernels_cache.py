# SPDX-License-Identifier: Apache-2.0
"""Paged cache reads and writes, layouts, prefetch and the sampling filter, against plain indexing."""

import pytest
import torch
import torch_npu

strict_only = pytest.mark.skipif(not torch.ops.ascend_sim.strict(), reason="ASCEND_SIM_STRICT=0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
def test_scatter_norm(dtype, slot_type):
    """Relaxed mode skips negative slots."""
    key, value = torch.randint(100, (5, 3, 8)).to(dtype), torch.randint(100, (5, 3, 4)).to(dtype)
    key_cache, value_cache = torch.zeros(4, 16, 3, 8, dtype=dtype), torch.zeros(4, 16, 3, 4, dtype=dtype)
    none = 5 if torch.ops.ascend_sim.strict() else -1
    slots = torch.tensor([17, none, 63, 0, 33], dtype=slot_type)
    caches = key_cache.npu(), value_cache.npu()
    torch_npu.npu_scatter_pa_kv_cache(
        key.npu(), value.npu(), key_cache=caches[0], value_cache=caches[1], slot_mapping=slots.npu(), cache_mode="Norm"
    )
    for rows, cache, now in ((key, key_cache, caches[0]), (value, value_cache, caches[1])):
        cache.view(64, *rows.shape[1:])[slots[slots >= 0].long()] = rows[slots >= 0]
        assert torch.equal(now.cpu(), cache)


def test_scatter_pa_nz():
    rows, slots = torch.randn(6, 4, 32), torch.tensor([3, 40, 63, 0, 9, 32], dtype=torch.int32)
    cache = torch.zeros(2, 4 * 32 // 16, 32, 16).npu()
    torch_npu.npu_scatter_pa_kv_cache(rows.npu(), rows.npu(), cache, torch.zeros_like(cache), slots.npu())
    plain = cache.cpu().permute(0, 2, 1, 3).reshape(64, 4, 32)  # block, token, heads * size
    assert torch.equal(plain[slots.long()], rows)
    assert plain.count_nonzero() == rows.count_nonzero()


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("offsets", [None, [16, 0, 32]])
def test_gather(cumulative, offsets):
    key_cache, value_cache = torch.randn(9, 16, 2, 8), torch.randn(9, 16, 2, 4)
    tables = torch.tensor([[3, 1, 0, 8], [7, 5, 2, 2], [4, 6, 8, 1]], dtype=torch.int32)
    lengths = torch.tensor([20, 0, 17], dtype=torch.int32)
    given = (
        torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32))) if cumulative else lengths
    )
    key, value = torch.zeros(37, 2, 8).npu(), torch.zeros(37, 2, 4).npu()
    start = None if offsets is None else torch.tensor(offsets, dtype=torch.int32).npu()
    torch_npu.npu_gather_pa_kv_cache(
        key_cache.npu(),
        value_cache.npu(),
        tables.npu(),
        given.npu(),
        key,
        value,
        seq_offset=start,
        is_seq_lens_cumsum=cumulative,
    )
    for cache, now in ((key_cache, key), (value_cache, value)):
        first = offsets or [0, 0, 0]
        parts = [cache[tables[b].long()].flatten(0, 1)[first[b] : first[b] + int(lengths[b])] for b in range(3)]
        assert torch.equal(now.cpu(), torch.cat(parts))


def test_cache_rejections():
    key, cache = torch.ones(2, 3, 8).npu(), torch.zeros(4, 16, 3, 8).npu()
    slots = torch.tensor([1, 64], dtype=torch.int32).npu()
    write = torch_npu.npu_scatter_pa_kv_cache
    with pytest.raises(
        RuntimeError, match=r"slot_mapping must lie below num_blocks \* block_size = 64, got 64 for token 1"
    ):
        write(key, key, cache, cache, slots, cache_mode="Norm")
    assert not cache.any()
    with pytest.raises(RuntimeError, match="cache_mode must be 'Norm' or 'PA_NZ', got 'ND'"):
        write(key, key, cache, cache, slots, cache_mode="ND")
    with pytest.raises(RuntimeError, match=r"seq_lens .compressed cache. is not simulated"):
        write(key, key, cache, cache, slots, seq_lens=slots, cache_mode="Norm")


def test_format_cast_keeps_the_numbers():
    x = torch.randn(6, 32).npu()
    y = torch_npu.npu_format_cast(x.t(), 29)
    assert torch.equal(y, x.t())
    assert y.data_ptr() != x.data_ptr()
    with pytest.raises(RuntimeError, match="acl_format 3 is not simulated"):
        torch_npu.npu_format_cast(x, 3)


def test_prefetch():
    x = torch.ones(4).npu()
    torch_npu.npu_prefetch(x, None, 1000)
    with pytest.raises(RuntimeError, match=r"max_size should be greater than zero|max_size must be greater than 0"):
        torch_npu.npu_prefetch(x, None, 0)
    with pytest.raises(RuntimeError, match="offset must lie in the tensor's 16 bytes, got 16"):
        torch_npu.npu_prefetch(x, None, 4, 16)


def filtered(logits, p, k):
    """The documentation's nine steps, one by one."""
    values, order = logits.double().sort(dim=-1, stable=True)
    if k is not None:
        threshold = values.gather(1, logits.size(1) - k.long()[:, None])
        values = values.masked_fill(values < threshold, -torch.inf)
    if p is not None:
        mask = values.softmax(-1).cumsum(-1) <= 1 - p.double()[:, None]
        mask[:, -1] = False
        values = values.masked_fill(mask, -torch.inf)
    return torch.empty_like(values).scatter(1, order, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("with_p", "with_k"), [(True, True), (True, False), (False, True)])
def test_top_k_top_p(dtype, with_p, with_k):
    logits = (torch.randn(5, 300) * 3).to(dtype)
    p = torch.tensor([0.1, 0.5, 0.93, 0.77, 0.0]).to(dtype) if with_p else None
    k = torch.tensor([1, 10, 300, 50, 7], dtype=torch.int32) if with_k else None
    result = torch_npu.npu_top_k_top_p(logits.npu(), *(None if t is None else t.npu() for t in (p, k)))
    assert result.dtype == dtype
    assert torch.equal(result.cpu().double(), filtered(logits, p, k))


@strict_only
def test_strict_top_k():
    with pytest.raises(RuntimeError, match=r"npu_top_k_top_p: k must lie in \[1, 1024\], got 2000"):
        torch_npu.npu_top_k_top_p(torch.ones(1, 4000).npu(), None, torch.tensor([2000], dtype=torch.int32).npu())
