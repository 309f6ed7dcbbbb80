# SPDX-License-Identifier: Apache-2.0
"""Lengths on the host that change between replays: torch_npu's task groups, updates and events from outside of graphs."""

import pytest
import torch
import torch_npu
from ascend_sim.counters import counting

BLOCK, HEADS, SIZE = 128, 2, 64
CAUSAL = torch.ones(2048, 2048, dtype=torch.int8).triu(1).npu()


class Decode:
    """Decoding steps over a paged cache, with as many layers as asked for, by one of the two operators."""

    def __init__(self, version, batch=4, layers=3):
        torch.manual_seed(0)
        self.version, self.batch = version, batch
        self.pages = [torch.randn(8, BLOCK, HEADS * SIZE).to(torch.bfloat16).npu() for _ in range(2 * layers)]
        self.table = torch.arange(2 * batch, dtype=torch.int32).view(batch, 2).npu()
        self.query = torch.zeros(batch, 2 * HEADS, SIZE, dtype=torch.bfloat16, device="npu")

    def step(self, lengths):
        x = self.query
        for key, value in zip(self.pages[::2], self.pages[1::2], strict=True):
            common = {
                "block_table": self.table,
                "atten_mask": CAUSAL,
                "sparse_mode": 3,
                "input_layout": "TND",
                "block_size": BLOCK,
            }
            ends = list(range(1, self.batch + 1))
            if self.version == 1:
                out, _ = torch_npu.npu_fused_infer_attention_score(
                    x, key, value, num_heads=2 * HEADS, num_key_value_heads=HEADS, scale=0.1, actual_seq_lengths=ends, actual_seq_lengths_kv=lengths, **common
                )  # fmt: skip
            else:
                out, _ = torch_npu.npu_fused_infer_attention_score_v2(
                    x, key, value, num_query_heads=2 * HEADS, num_key_value_heads=HEADS, softmax_scale=0.1, actual_seq_qlen=ends, actual_seq_kvlen=lengths, **common
                )  # fmt: skip
            x = x + out
        return x

    @property
    def name(self):
        return "actual_seq_lengths_kv" if self.version == 1 else "actual_seq_kvlen"

    def captured(self):
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph, auto_dispatch_capture=True):
            out = self.step([1] * self.batch)
        return graph, out

    def draw(self):
        self.query.copy_(torch.randn(self.query.shape).to(torch.bfloat16))
        return torch.randint(1, 2 * BLOCK, (self.batch,)).tolist()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("first", ["update", "replay"])
def test_lengths_of_a_replay(version, first):
    decode = Decode(version)
    graph, out = decode.captured()
    for _ in range(3):
        lengths = decode.draw()
        if first == "replay":
            graph.replay()
        graph.update(cpu_update_input=[{decode.name: lengths}])
        if first == "update":
            graph.replay()
        assert torch.equal(out, decode.step(lengths))


def test_lengths_of_each_layer():
    decode = Decode(1, layers=2)
    graph, out = decode.captured()
    lengths = [decode.draw(), decode.draw()]
    graph.update(cpu_update_input=[{decode.name: each} for each in lengths])
    graph.replay()
    x = decode.query
    for layer in range(2):
        single = Decode(1, layers=1)
        single.pages, single.query = decode.pages[2 * layer : 2 * layer + 2], x
        x = single.step(lengths[layer])
    assert torch.equal(out, x)


def test_launches_of_a_step():
    decode = Decode(2)
    graph, _ = decode.captured()
    with counting() as work:
        graph.replay()
        graph.update(cpu_update_input=[{decode.name: [5] * decode.batch}])
    assert (work.delta.graphs.replays, work.delta.graphs.updates, work.delta.launches) == (1, 3, 4)


def test_a_replay_without_an_update_has_no_end():
    decode = Decode(1)
    graph, out = decode.captured()
    lengths = decode.draw()
    graph.update(cpu_update_input=[{decode.name: lengths}])
    graph.replay()
    graph.replay()
    with pytest.raises(RuntimeError, match=r"NPUGraph\.update"):
        out + 1
    graph.update(cpu_update_input=[{decode.name: lengths}])
    graph.replay()
    assert torch.equal(out, decode.step(lengths))


def test_a_stale_length_gives_other_numbers():
    decode = Decode(1)
    graph, out = decode.captured()
    lengths = decode.draw()
    graph.update(cpu_update_input=[{decode.name: [1] * decode.batch}])
    graph.replay()
    assert not torch.equal(out, decode.step(lengths))


def test_an_address_that_is_not_the_captured_one_gives_other_numbers():
    decode = Decode(1)
    graph, out = decode.captured()
    lengths = decode.draw()
    decode.table = decode.table.flip(0).contiguous()  # another tensor: the graph reads the first
    graph.update(cpu_update_input=[{decode.name: lengths}])
    graph.replay()
    assert not torch.equal(out, decode.step(lengths))


def by_hand(decode):
    """A graph, its result and the handle of the task group of its only layer, without torch_npu's own mode."""
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    with torch.npu.graph(graph, stream=stream):
        torch.npu.graph_task_group_begin(stream)
        out = decode.step([1] * decode.batch)
        handle = torch.npu.graph_task_group_end(stream)
    return graph, out, handle


def test_a_task_group_by_hand():
    decode = Decode(2, layers=1)
    graph, out, handle = by_hand(decode)
    lengths, side = decode.draw(), torch.npu.Stream()
    with torch.npu.stream(side):
        torch.npu.graph_task_update_begin(side, handle)
        decode.step(lengths)
        torch.npu.graph_task_update_end(side)
    torch.npu.current_stream().wait_stream(side)
    graph.replay()
    assert torch.equal(out, decode.step(lengths))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(lambda decode: decode.query.neg(), "has npu::npu_fused_infer_attention_score_v2 here"),
     (lambda decode: None, "has to give anew every operator"),
     (lambda decode: [decode.step([1] * 4), decode.query.neg()], "has no more operators")],
)  # fmt: skip
def test_an_update_repeats_the_operators_of_its_group(wrong, said):
    decode = Decode(2, layers=1)
    _graph, _, handle = by_hand(decode)
    side = torch.npu.Stream()
    with torch.npu.stream(side):
        torch.npu.graph_task_update_begin(side, handle)
        errors = []
        for call in (lambda: wrong(decode), lambda: torch.npu.graph_task_update_end(side)):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))
    assert any(said in error for error in errors), errors


@pytest.mark.parametrize("version", ["", "_v2"])
def test_given_results(version):
    query = torch.randn(2, 4, 1, 64).to(torch.bfloat16).npu()
    first = not version
    name = f"npu_fused_infer_attention_score{version}"
    arguments = {"input_layout": "BNSD", "num_key_value_heads": 4, ("num_heads" if first else "num_query_heads"): 4}
    sums = {"softmax_lse_flag" if first else "return_softmax_lse": True}
    out = list(getattr(torch_npu, f"_{name}_infer_output")(query, query, **arguments, **sums))
    workspace = getattr(torch_npu, f"_{name}_get_max_workspace")(query, query, query, **arguments, **sums)
    getattr(torch_npu, name).out(query, query, query, **arguments, **sums, workspace=workspace, out=out)
    expected = getattr(torch_npu, name)(query, query, query, **arguments, **sums)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    with pytest.raises(RuntimeError, match=r"out\[0\] must be contiguous"):
        getattr(torch_npu, name).out(
            query, query, query, **arguments, **sums, workspace=workspace, out=[out[0][:1], out[1]]
        )
