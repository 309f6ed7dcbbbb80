# SPDX-License-Identifier: Apache-2.0
"""What cannot be captured in a graph is refused by name while it is captured, and the process goes on without graphs."""

import re

import pytest
import torch
import torch_npu

X = torch.randn(4, 64).npu()
HOST = torch.randn(4, 64)


def on_another_stream():
    with torch.npu.stream(torch.npu.Stream()):
        return X + 1


def never_joined():
    side = torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        return X + 1


def outside_event():
    torch.npu.current_stream().wait_event(OUTSIDE)


OUTSIDE = torch.npu.Event()
OUTSIDE.record()


def attention(**kwargs):
    query = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16, device="npu")
    return torch_npu.npu_fused_infer_attention_score(
        query, query, query, num_heads=2, num_key_value_heads=2, input_layout="BNSD", scale=1.0, **kwargs
    )


WRONG = {
    "waits for the device": (torch.npu.synchronize, "aclrtSynchronizeDevice"),
    "waits for its stream": (lambda: torch.npu.current_stream().synchronize(), "aclrtSynchronizeStream"),
    "waits for an event": (OUTSIDE.synchronize, "aclrtSynchronizeEvent"),
    "a number": (lambda: X.sum().item(), "aten::_local_scalar_dense needs numbers of the device"),
    "a list": (lambda: X.tolist(), "aten::_to_copy between host and device|aten::copy_ between host and device"),
    "a mask": (lambda: X[X > 0], "aten::index with a mask"),
    "a mask that is written": (lambda: X.clone().index_put_((X > 0,), X.new_zeros(())), "aten::index_put_ with a mask|aten::_index_put_impl_ with a mask"),
    "nonzero": (lambda: X.nonzero(), "aten::nonzero needs numbers"),
    "masked select": (lambda: X.masked_select(X > 0), "aten::masked_select needs numbers"),
    "unique": (lambda: X.unique(), "needs numbers of the device"),
    "a blocking copy to the host": (lambda: X.cpu(), "aten::_to_copy between host and device waits"),
    "a blocking copy": (lambda: X.copy_(HOST), "aten::copy_ between host and device waits"),
    "a pageable copy": (lambda: X.copy_(HOST, non_blocking=True), "aten::copy_ between host and device needs pinned memory"),
    "a tensor of the host": (lambda: torch.tensor([1, 2], device="npu"), "between host and device"),
    "random numbers": (lambda: torch.rand(3, device="npu"), "aten::uniform_ draws random numbers"),
    "lengths on the host": (lambda: attention(actual_seq_lengths_kv=[1]), "npu::npu_fused_infer_attention_score takes a list of lengths"),
    "a stream that has not joined": (on_another_stream, "aten::add runs on a stream that has not joined"),
    "a stream that does not come back": (never_joined, "has not joined: the stream where the capture began has to wait"),
    "an event from before": (outside_event, "cannot wait for an event that was recorded outside|it waits for an event"),
    "an error of a kernel": (lambda: X @ HOST.npu(), "between host and device|aten::mm"),
}  # fmt: skip


def messages(error):
    text = []
    while error is not None:
        text.append(str(error))
        error = error.__context__
    return "\n".join(text)


@pytest.mark.parametrize("what", WRONG)
def test_refused(what):
    call, said = WRONG[what]
    stream = torch.npu.current_stream()
    try:
        with pytest.raises((RuntimeError, TypeError)) as refused, torch.npu.graph(torch.npu.NPUGraph()):
            call()
    finally:
        torch.npu.set_stream(stream)  # torch.npu.graph leaves its own where the end of the capture fails
    assert re.search(said, messages(refused.value)), messages(refused.value)
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = X + 1
    graph.replay()
    assert torch.equal(out, X + 1)


def test_the_default_stream_is_refused():
    graph = torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match="default stream"):
        graph.capture_begin()


def test_lengths_on_the_host_without_the_lists():
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        attention()
    graph.replay()
