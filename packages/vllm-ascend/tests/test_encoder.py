# SPDX-License-Identifier: Apache-2.0
"""One layer of an encoder against plain arithmetic in float64, in bfloat16 and strict mode."""

from types import SimpleNamespace

import pytest
import torch
from attention_bounds import attend
from vllm_ascend.attention import kernels
from vllm_ascend.attention.encoder import AscendEncoderAttentionBackend, AscendEncoderAttentionImpl

LENGTHS = [1, 5, 1, 40]
HEADS, KV_HEADS = 4, 2


def rows(heads, size, seed):
    """Query, key or value as a model gives it: a part of one tensor, in bfloat16."""
    made = torch.randn(sum(LENGTHS) + 2, 3 * heads * size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return made.npu()[:, heads * size : 2 * heads * size].view(-1, heads, size)


def plain(query, key, value, scale, window):
    """The result `[T, N, D]` in float64, and how far it may be from a kernel's that adds up in float32 and rounds it to bfloat16."""
    query, key, value = (x.cpu() for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    results, begin = [], 0
    for length in LENGTHS:
        places = torch.arange(length)
        unseen = (places[:, None] - places).abs() >= (length if window is None else window)
        mine = slice(begin, begin + length)
        results.append(attend(query[mine], key[mine], value[mine], scale, unseen))
        begin += length
    return [torch.cat(part) for part in zip(*results, strict=True)]


@pytest.mark.parametrize("size", [32, 40, 64, 80, 128, 192, 200, 256])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_a_layer(size, window):
    assert "get_name" not in vars(AscendEncoderAttentionBackend)  # vLLM's table knows the base class's name
    impl = AscendEncoderAttentionImpl(
        HEADS, size, size**-0.5, KV_HEADS, sliding_window=window, attn_type="encoder_only"
    )
    query, key, value = rows(HEADS, size, 0), rows(KV_HEADS, size, 1), rows(KV_HEADS, size, 2)
    tokens = sum(LENGTHS)
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    step = SimpleNamespace(
        num_actual_tokens=tokens, query_ends=ends, mask=kernels.causal_mask(query.device), causal=False
    )
    output = torch.full_like(query, 7)
    empty = torch.tensor([]).npu()
    impl.do_kv_cache_update(None, key, value, empty, torch.full((tokens,), -1).npu())
    assert impl.forward(None, query, key, value, empty, step, output) is output
    exact, allowed = plain(query, key, value, impl.scale, window)
    found = output.cpu().double()
    assert ((found[:tokens] - exact).abs() <= allowed).all()
    assert (found[tokens:] == 7).all()  # padding
    for wrong in (5 if window is None else window + 1, 1 if window is None else max(window - 1, 2)):
        if wrong != window:
            assert not ((found[:tokens] - plain(query, key, value, impl.scale, wrong)[0]).abs() <= allowed).all()


def test_a_profiling_run_gives_zeros():
    impl = AscendEncoderAttentionImpl(HEADS, 64, 0.125, attn_type="encoder_only")
    output = torch.ones(3, HEADS, 64).npu()
    assert not impl.forward(None, output, output, output, torch.tensor([]).npu(), None, output).any()
