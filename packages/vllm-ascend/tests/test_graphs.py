# SPDX-License-Identifier: Apache-2.0
"""Graphs without an engine: the way into a capture and out of it, slots of padding, and lengths of layers."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from vllm_ascend import graphs
from vllm_ascend.attention import kernels

BLOCK, HEADS, SIZE, REQUESTS = 128, 2, 64, 3


@pytest.fixture
def side():
    """A side stream, which is the current one for the test."""
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        yield stream


def test_a_failed_capture_leaves_the_stream_and_no_mode(side):
    x = torch.ones(3, device="npu")
    refused = pytest.raises(RuntimeError, match="_local_scalar_dense needs numbers of the device")
    with refused, graphs._capturing(torch.npu.NPUGraph(), None):
        x.sum().item()
    assert torch.npu.current_stream() == side
    assert _get_current_dispatch_mode() is None
    graph = torch.npu.NPUGraph()
    with graphs._capturing(graph, None):
        y = x + 1
    graph.replay()
    assert y.eq(2).all()


def test_an_end_that_fails_is_an_error(side):
    """Work on another stream that nothing waits for is found when the capture ends."""
    x, other = torch.ones(3, device="npu"), torch.npu.Stream()
    refused = pytest.raises(RuntimeError, match="has not joined")
    with refused, graphs._capturing(torch.npu.NPUGraph(), None):
        other.wait_stream(side)
        with torch.npu.stream(other):
            x.neg()
    assert torch.npu.current_stream() == side
    assert _get_current_dispatch_mode() is None


def test_slots_of_padding():
    """Layers of one KV-cache group share one tensor; padding tokens get different slots in the block that no request has."""
    slots, spare = torch.tensor([5 + BLOCK, 300, -1, -1]).npu(), (torch.arange(8) % 3).npu()
    writable = graphs._writable({"0": slots, "1": slots, "2": slots.clone()}, spare)
    assert writable["0"] is writable["1"]
    assert writable["0"] is not writable["2"]
    assert writable["2"].tolist() == [5 + BLOCK, 300, 2, 0]


def test_slots_of_a_step_without_requests():
    slots = torch.full((4,), -1, dtype=torch.int64, device="npu")
    graphs._number({"0": slots, "1": slots})
    assert slots.tolist() == [0, 1, 2, 3]
    graphs._number(None)


@pytest.mark.parametrize(
    ("sizes", "each", "several", "kept"),
    [
        ([1, 2, 4, 128, 136, 256], 1, False, [1, 2, 4, 128, 136, 256]),
        ([1, 2, 4, 128, 136, 256], 1, True, [1, 2, 4, 128]),
        ([1, 130, 131], 1, False, [1, 130, 131]),  # 128 padding tokens at most
        ([1, 131, 132], 1, False, [1, 132]),
        ([129, 512], 1, False, [129]),
        ([4, 136, 272], 4, False, [4, 136]),  # of requests of 4 tokens, 136 from 8 on and 272 from 140 on
        ([4, 136, 272], 4, True, [4]),
    ],
)
def test_sizes_whose_padding_finds_slots(sizes, each, several, kept):
    assert graphs.fitting(sizes, BLOCK, each=each, padded_to_others=several) == kept


@pytest.mark.parametrize("shared", [True, False])
def test_lengths_of_layers(side, shared):
    """Two layers of one group share the lengths of a step; two of different groups have their own."""
    torch.manual_seed(0)
    caches = [torch.randn(4, BLOCK, HEADS * SIZE).to(torch.bfloat16).npu() for _ in range(4)]
    table = torch.arange(REQUESTS, dtype=torch.int32).view(-1, 1).npu()
    query = torch.zeros(REQUESTS, HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    mask = kernels.causal_mask(query.device)

    def step(lengths):
        x = query
        for layer in range(2):
            x = x + kernels.attention(
                x, *caches[2 * layer : 2 * layer + 2], num_heads=HEADS, num_key_value_heads=HEADS, scale=0.1, block_table=table, block_size=BLOCK,
                actual_seq_lengths=[1, 2, 3], actual_seq_lengths_kv=lengths[layer], sparse_mode=kernels.SPARSE_CAUSAL, atten_mask=mask,
            )  # fmt: skip
        return x

    graph = torch.npu.NPUGraph()
    with graphs._capturing(graph, None):
        out = step([[1, 1, 1], [1, 1, 1]])
    captured = graphs._Captured(graph, out, ["first", "second"], spare=torch.empty(0))
    for _ in range(3):
        query.copy_(torch.randn(query.shape).to(torch.bfloat16))
        first = [*torch.randint(1, BLOCK, (2,)).tolist(), 0]  # the last request is padding
        lengths = [first, first if shared else [*torch.randint(1, BLOCK, (2,)).tolist(), 0]]
        captured.replay(
            {name: SimpleNamespace(kv_lengths=each) for name, each in zip(captured.layers, lengths, strict=True)}
        )
        assert torch.equal(out, step(lengths))
