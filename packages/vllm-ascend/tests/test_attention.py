# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged cache without an engine, in the simulator's strict mode: against float64 mathematics."""

from types import SimpleNamespace

import pytest
import torch
from attention_bounds import attend, causal
from paged_steps import Step

SIZES = [64, 80, 96, 112, 128, 40, 72, 100, 192, 256]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [None, 1, 7, 130])
def test_head_sizes_and_windows(size, window):
    """A head of another size than the kernel's is padded; the scale stays that of the true one. A window of 1 is the token itself."""
    step = Step([1, 20, 1, 2], [130, 0, 0, 255], heads=4, kv_heads=2, size=size, window=window)
    found, scale = step.run().double(), size**-0.5
    expected, allowed = [], []
    for query, keys, values in step.requests():
        out, bound = attend(query, keys, values, scale, causal(len(query), len(keys), window))
        expected.append(out)
        allowed.append(bound)
    expected, allowed = torch.cat(expected), torch.cat(allowed)
    assert ((found - expected).abs() <= allowed).all()
    for wrong in (expected.roll(1, 1), expected * (1 + 2**-6)):
        assert not ((found - wrong).abs() <= allowed).all()


@pytest.mark.parametrize(("size", "window"), [(64, None), (40, 7), (256, None)])
def test_keys_beside_their_values(size, window):
    """Blocks that are one piece, as of models with recurrent states, give the same bits; what no request wrote is NaN in both."""
    from vllm_ascend.attention.paired import AscendPairedAttentionBackend

    arguments = {"lengths": [1, 20, 1, 2], "context": [130, 0, 0, 255], "heads": 4, "kv_heads": 2, "size": size}
    paired = Step(**arguments, window=window, backend=AscendPairedAttentionBackend)
    assert paired.cache.is_contiguous()
    assert torch.equal(paired.run(), Step(**arguments, window=window).run())


@pytest.mark.parametrize("size", [264, 320, 512])
def test_wide_heads(size):
    """Heads of more than 256 numbers: one call for consecutive requests with equally many tokens, also where keys lie beside their values."""
    from ascend_sim import counters
    from vllm_ascend.attention.paired import AscendPairedAttentionBackend

    arguments = {
        "lengths": [1, 1, 20, 1, 2, 2],
        "context": [130, 0, 0, 255, 9, 130],
        "heads": 4,
        "kv_heads": 2,
        "size": size,
    }
    step, scale = Step(**arguments), size**-0.5
    before = counters.snapshot().operators
    found = step.run()
    name = "npu::npu_fused_infer_attention_score"
    assert counters.snapshot().operators[name].calls - (before[name].calls if name in before else 0) == 4
    parts = [attend(*rows, scale, causal(len(rows[0]), len(rows[1]))) for rows in step.requests()]
    expected, allowed = (torch.cat(part) for part in zip(*parts, strict=True))
    assert ((found.double() - expected).abs() <= allowed).all()
    for wrong in (expected.roll(1, 1), expected * (1 + 2**-6)):
        assert not ((found.double() - wrong).abs() <= allowed).all()
    assert torch.equal(Step(**arguments, backend=AscendPairedAttentionBackend).run(), found)


def test_wide_heads_have_no_window():
    with pytest.raises(ValueError, match=r"takes no heads of 320 numbers with a sliding window \(16\)"):
        Step([1], [0], heads=4, kv_heads=2, size=320, window=16)


def test_the_table_of_paired_blocks_keeps_its_place():
    """A graph reads it there."""
    from paged_steps import description
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm_ascend.attention.paired import AscendPairedAttentionBackend

    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, head_size_v=64, dtype=torch.bfloat16)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=None), scheduler_config=SimpleNamespace(max_num_seqs=4)
    )
    builder = AscendPairedAttentionBackend.get_builder_cls()(spec, [], config, torch.device("npu"))
    tables = []
    for requests in (2, 4, 1):
        table = torch.arange(requests * 3, dtype=torch.int32).view(requests, 3)
        tables.append(builder.build(0, description([1] * requests, [5] * requests, table)).block_table)
        assert torch.equal(tables[-1].cpu(), table * 2)
    assert len({table.data_ptr() for table in tables}) == 1


@pytest.mark.parametrize("window", [7, None])
def test_another_window_or_scale_is_caught(window):
    """The bound above is smaller than what a window one key longer, or the scale of the padded size, does."""
    step = Step([20], [40], heads=4, kv_heads=2, size=80, window=window)
    ((query, keys, values),) = step.requests()
    found = step.run().double()
    for wrong_window, scale in ((None if window is None else window + 1, 80**-0.5), (window, 128**-0.5)):
        if (wrong_window, scale) != (window, 80**-0.5):
            out, bound = attend(query, keys, values, scale, causal(20, 60, wrong_window))
            assert not ((found - out).abs() <= bound).all()


def test_the_cache_has_room_for_padded_heads():
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm_ascend.attention.gqa import AscendAttentionBackend

    spec = FullAttentionSpec(block_size=128, num_kv_heads=3, head_size=80, head_size_v=80, dtype=torch.bfloat16)
    assert AscendAttentionBackend.customize_spec(spec).page_size_bytes == 128 * 2 * 3 * 128 * 2


@pytest.mark.parametrize("fused", [True, False])
def test_views_of_a_fused_projection(fused):
    """Query, key and value of models such as GPT-2 and OPT are parts of one tensor, and the kernel's are contiguous; what is so already is not copied."""
    step = Step([3, 1], [0, 5], heads=4, kv_heads=4, size=64)
    separate = step.run()
    if fused:
        step.fuse()
    torch.ops.ascend_sim.reset_counts()
    assert torch.equal(step.run(), separate)
    names, calls, _ = torch.ops.ascend_sim.counts()
    assert dict(zip(names, calls, strict=True)).get("aten::contiguous", 0) == (3 if fused else 0)


@pytest.mark.parametrize(
    ("metadata", "kept"), [(None, 0), ({}, 0), ({"layer": SimpleNamespace(num_actual_tokens=1, query_ends=[1])}, 1)]
)
def test_no_padding_slots(metadata, kept):
    """Padding tokens, and all tokens of a rank without requests, have slots of -1, which the kernel does not take."""
    from vllm.forward_context import override_forward_context

    step = Step([1, 1], [0, 0], heads=2, kv_heads=2, size=64)
    cache = torch.zeros(1, 2, 128, 128).bfloat16().npu()
    rows = torch.ones(2, 2, 64).bfloat16().npu()
    with override_forward_context(SimpleNamespace(attn_metadata=metadata)):
        step.impl.do_kv_cache_update(None, rows, rows, cache, torch.tensor([5, -1]).npu())
    assert cache.count_nonzero() == kept * 2 * 128
