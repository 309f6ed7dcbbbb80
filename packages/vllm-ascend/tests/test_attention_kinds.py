# SPDX-License-Identifier: Apache-2.0
"""Sinks, soft caps, ALiBi and pictures that see both ways, over a paged cache without an engine, in strict mode: against float64 mathematics."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_bounds import attend, causal
from paged_steps import Step, description, paged

LENGTHS, CONTEXT = [1, 20, 1, 1, 2], [130, 0, 3, 0, 255]


def compare(step, changed=None, **terms):
    """The step's results against mathematics, whose terms are functions of a request's query and keys; and against other mathematics, which they are not."""
    found, size = step.run().double(), step.query[0].shape[-1]
    window = step.impl.sliding_window
    for differs in (False, True) if changed else (False,):
        expected, allowed = [], []
        for request, (query, keys, values) in enumerate(step.requests()):
            given = {name: term(query, keys) if callable(term) else term for name, term in ({**terms, **changed} if differs else terms).items()}  # fmt: skip
            unseen, clamped = causal(len(query), len(keys), window), given.pop("clamped", False)
            for first, last in given.pop("spans", {}).get(request, ()):
                rows = slice(max(first - len(keys) + len(query), 0), last + 1 - len(keys) + len(query))
                before = torch.arange(len(keys)) <= torch.arange(len(keys))[-len(query) :, None] - (window or len(keys))
                unseen[rows, first : last + 1] = before[rows, first : last + 1] if clamped else False
            out, bound = attend(query, keys, values, size**-0.5, unseen, **given)
            expected.append(out)
            allowed.append(bound)
        assert ((found - torch.cat(expected)).abs() <= torch.cat(allowed)).all() != differs


def biases(slopes):
    """Of a query and keys: each head's slope times the distance."""
    return lambda query, keys: (
        torch.tensor(slopes)[:, None, None]
        * (torch.arange(len(keys)) - torch.arange(len(keys) - len(query), len(keys))[:, None])
    )


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_sinks(size, window):
    from vllm_ascend.attention.sinks import AscendSinkAttentionBackend

    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0]).bfloat16()
    options = {"heads": 4, "kv_heads": 2, "size": size, "window": window}
    step = Step(LENGTHS, CONTEXT, backend=AscendSinkAttentionBackend, sinks=sinks.npu(), **options)
    compare(step, {"sinks": None}, sinks=sinks)
    assert AscendSinkAttentionBackend.kernel_size(129) == 0


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [64, 80])
def test_a_soft_cap(size, window):
    from vllm_ascend.attention.composed import AscendComposedAttentionBackend

    options = {"heads": 4, "kv_heads": 2, "size": size, "window": window, "soft_cap": 2.0}
    step = Step(LENGTHS, CONTEXT, backend=AscendComposedAttentionBackend, **options)
    compare(step, {"cap": 0}, cap=2.0)


def test_alibi():
    from vllm_ascend.attention.composed import AscendComposedAttentionBackend

    slopes = [0.5, 0.25, 0.125, 0.0625]
    options = {"heads": 4, "kv_heads": 4, "size": 64, "slopes": slopes}
    step = Step(LENGTHS, CONTEXT, backend=AscendComposedAttentionBackend, **options)
    compare(step, {"bias": biases(slopes[::-1])}, bias=biases(slopes))


def test_a_prompt_whose_scores_are_computed_in_pieces(monkeypatch):
    from vllm_ascend.attention import composed

    monkeypatch.setattr(composed, "_MOST_SCORES", 3 * 4 * 128)  # three rows of 4 heads and 128 keys
    options = {"heads": 4, "kv_heads": 2, "size": 64, "soft_cap": 2.0}
    compare(Step([20], [40], backend=composed.AscendComposedAttentionBackend, **options), cap=2.0)


@pytest.mark.parametrize("window", [None, 5])
def test_pictures_see_both_ways(window):
    """A picture of an earlier step changes nothing; a step without pictures takes the kernel."""
    from vllm_ascend.attention.composed import AscendComposedAttentionBackend

    options = {"heads": 4, "kv_heads": 2, "size": 64, "window": window, "backend": AscendComposedAttentionBackend}
    spans = {1: [(2, 8), (12, 15)], 4: [(100, 120)]}
    step = Step(LENGTHS, CONTEXT, spans=spans, **options)
    assert step.metadata.sees_both_ways
    compare(step, {"spans": {}}, spans={1: spans[1]})
    later = Step(LENGTHS, CONTEXT, spans={4: spans[4]}, **options)
    assert not later.metadata.sees_both_ways
    torch.ops.ascend_sim.reset_counts()
    compare(later)
    names, calls, _ = torch.ops.ascend_sim.counts()
    assert dict(zip(names, calls, strict=True))["npu::npu_fused_infer_attention_score"] == 1


def test_pictures_in_a_model_whose_layers_differ():
    """Gemma 4: keys lie beside their values; a picture's tokens do not see what is before their window, and in layers without one the model has vLLM take pictures for text."""
    from vllm_ascend.attention.paired_composed import AscendPairedComposedAttentionBackend

    options = {"heads": 4, "kv_heads": 2, "size": 64, "backend": AscendPairedComposedAttentionBackend}
    spans = {1: [(2, 15)]}
    step = Step(LENGTHS, CONTEXT, spans=spans, window=5, **options)
    step.layer = SimpleNamespace(mm_prefix_clamp_sliding_window=True)
    compare(step, {"clamped": False}, spans=spans, clamped=True)
    whole = Step(LENGTHS, CONTEXT, spans=spans, **{**options, "size": 320})
    compare(whole, {"spans": {}}, spans=spans)
    whole.metadata.mm_prefix_range = None
    torch.ops.ascend_sim.reset_counts()
    compare(whole)
    names, calls, _ = torch.ops.ascend_sim.counts()
    assert dict(zip(names, calls, strict=True))["npu::npu_fused_infer_attention_score"] == 4


def test_cross_attention():
    """A request that begins writes what the encoder said of it; all see their own encoder's keys, however many tokens the decoder has."""
    from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
    from vllm.v1.kv_cache_interface import CrossAttentionSpec
    from vllm_ascend.attention.cross import AscendCrossAttentionBackend

    backend = create_cross_attention_backend(AscendCrossAttentionBackend)
    random, heads, size, block = torch.Generator().manual_seed(2), 4, 64, 128
    encoded, decoding = [140, 30], [3, 1]  # keys of each; query tokens of each
    table, _, blocks = paged(encoded, block, random)
    spec = CrossAttentionSpec(
        block_size=block, num_kv_heads=heads, head_size=size, head_size_v=size, dtype=torch.bfloat16
    )
    memory = torch.full((2, blocks, block, heads * size), torch.nan).bfloat16().npu()
    cache, impl = memory.transpose(0, 1), backend.get_impl_cls()(heads, size, size**-0.5, heads)
    builder = backend.get_builder_cls()(
        spec, [], SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=None)), torch.device("npu")
    )
    layer = SimpleNamespace(kv_sharing_target_layer_name=None)

    def normal(*shape):
        return torch.randn(*shape, generator=random).bfloat16()

    def step(lengths, seen, key, value, query):
        described = description(lengths, [new + old for new, old in zip(lengths, seen, strict=True)], table)
        described.encoder_seq_lens = torch.tensor(encoded, dtype=torch.int32).npu()
        described.encoder_seq_lens_cpu = np.array(encoded, dtype=np.int32)
        output = torch.empty(query.shape, dtype=torch.bfloat16).npu()
        impl.forward(layer, query.npu(), key, value, cache, builder.build(0, described), output)
        return output.cpu().double()

    keys, values = ([normal(count, heads, size) for count in encoded] for _ in range(2))
    query = normal(sum(decoding), heads, size)
    written = [torch.cat(rows).npu() for rows in (keys, values)]
    first = step(decoding, [0, 0], *written, query)
    later = step([1, 1], decoding, None, None, query[[0, 3]])
    for number, (rows, begin) in enumerate(zip(query.split(decoding), (0, 3), strict=True)):
        unseen = torch.zeros(len(rows), encoded[number], dtype=torch.bool)
        out, bound = attend(rows, keys[number], values[number], size**-0.5, unseen)
        assert ((first[begin : begin + len(rows)] - out).abs() <= bound).all()
        assert ((later[number] - out[0]).abs() <= bound[0]).all()
    assert cache[:, 0].flatten(0, 1).isfinite().all(-1).sum() == sum(encoded)


def test_other_terms_are_refused():
    from vllm_ascend.attention.composed import AscendComposedAttentionImpl
    from vllm_ascend.attention.gqa import AscendAttentionImpl
    from vllm_ascend.attention.sinks import AscendSinkAttentionImpl

    sinks = torch.ones(2)
    for make in (
        lambda: AscendAttentionImpl(2, 64, 1.0, sinks=sinks),
        lambda: AscendAttentionImpl(2, 64, 1.0, alibi_slopes=[0.5, 0.25]),
        lambda: AscendAttentionImpl(2, 64, 1.0, logits_soft_cap=30.0),
        lambda: AscendComposedAttentionImpl(2, 64, 1.0, sinks=sinks),
        lambda: AscendComposedAttentionImpl(2, 64, 1.0, use_alibi_sqrt=True),
        lambda: AscendSinkAttentionImpl(2, 64, 1.0, logits_soft_cap=30.0, sinks=sinks),
    ):
        with pytest.raises(ValueError, match="the NPU attention kernel has no"):
            make()
