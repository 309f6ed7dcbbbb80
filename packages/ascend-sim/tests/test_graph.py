# SPDX-License-Identifier: Apache-2.0
"""Graphs of the real torch_npu (torch.npu.NPUGraph): a replay computes, bit by bit, what the same calls compute one by one."""

import gc

import pytest
import torch
import torch_npu
from ascend_sim.counters import counting

DTYPE = torch.bfloat16


def rand(*shape):
    return torch.randn(*shape).to(DTYPE).npu()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def norms(x, w):
    out, _ = torch_npu.npu_rms_norm(x, w[0].contiguous(), 1e-6)
    return torch_npu.npu_add_rms_norm(out, x, w[1].contiguous(), 1e-6)[::2]


def rotary(x, w):
    query, key = x.view(4, 1, 2, 32).contiguous(), (x @ w).view(4, 1, 2, 32)
    angles = x.view(4, 1, 2, 32)[:, :, :1].contiguous()
    return torch_npu.npu_rotary_mul(query, angles, angles), torch_npu.npu_rotary_mul(key, angles, angles)


def experts(x, w):
    weights, ids, _ = torch_npu.npu_moe_gating_top_k_softmax((x @ w)[:, :8].contiguous(), k=2)
    rows, back, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x, ids, active_num=8, expert_num=8, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, 8], quant_mode=-1,
    )  # fmt: skip
    (product,) = torch_npu.npu_grouped_matmul(
        [rows], [w.expand(8, -1, -1).contiguous()], group_list=counts, split_item=2, group_type=0, group_list_type=1
    )
    return torch_npu.npu_moe_token_unpermute(product, back.abs(), probs=weights.to(DTYPE))


def int8(x, w):
    quantised, scale = torch_npu.npu_dynamic_quant(x)
    weight = (w * 20).round().to(torch.int8)
    return torch_npu.npu_quant_matmul(quantised, weight, w[0].float(), pertoken_scale=scale, output_dtype=DTYPE)


def int4(x, w):
    weight = torch_npu.npu_convert_weight_to_int4pack((w * 20).round().clamp(-8, 7).int())
    return torch_npu.npu_weight_quant_batchmatmul(x, weight, w[:2].contiguous(), antiquant_group_size=32)


def cache(x, w):
    pages = [torch.zeros(4, 128, 1, 64, dtype=DTYPE, device="npu") for _ in range(2)]
    torch_npu.npu_scatter_pa_kv_cache(x.view(4, 1, 64), (x @ w).view(4, 1, 64), *pages, SLOTS, cache_mode="Norm")
    return pages


SLOTS = torch.tensor([3, 130, 5, 400], dtype=torch.int32).npu()
KINDS = {
    "product": lambda x, w: x @ w,
    "bias": lambda x, w: torch.nn.functional.linear(x, w, w[0]),
    "pointwise": lambda x, w: (torch.relu(x) + 1) * x.sigmoid() / 3,
    "in place": lambda x, w: x.clone().add_(1).mul_(w[0]).clamp_(-1, 1),
    "view": lambda x, w: (x @ w).view(4, 2, 32).transpose(0, 1).contiguous() + 1,
    "parts": lambda x, w: [part + 1 for part in (x @ w).split(16, -1)],
    "reduction": lambda x, w: (x.float().sum(-1), x.max(-1), x.argsort(-1), x.topk(3)),
    "indices": lambda x, w: (w[x.argmax(-1)], torch.nn.functional.embedding(x.argmax(-1), w)),
    "filled": lambda x, w: torch.zeros(3, device="npu").add_(x.float().sum()).index_fill_(0, x[0].argmax().view(1) % 3, 7.0),
    "out": lambda x, w: torch.mm(x, w, out=torch.empty(4, 64, dtype=DTYPE, device="npu")),
    "joined": lambda x, w: (torch.cat((x, x @ w)), torch.stack((x, x)), torch.where(x > 0, x, w[:4])),
    "norms": norms,
    "rotary": rotary,
    "activation": lambda x, w: torch_npu.npu_swiglu(x @ w),
    "experts": experts,
    "int8": int8,
    "int4": int4,
    "cache": cache,
}  # fmt: skip


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


def reserved():
    """Bytes that the allocator holds for tensors that live, and for graphs."""
    gc.collect()
    torch.npu.empty_cache()
    return torch.npu.memory_reserved()


def captured(call, **kwargs):
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **kwargs):
        out = call()
    return graph, out


@pytest.mark.parametrize("kind", KINDS)
def test_replay_equals_eager(kind):
    x, w = rand(4, 64), rand(64, 64)
    graph, out = captured(lambda: KINDS[kind](x, w))
    for _ in range(2):
        x.copy_(rand(4, 64))
        for t in tensors(out):
            t.fill_(0)
        graph.replay()
        expected = KINDS[kind](x, w)
        assert all(torch.equal(a, b) for a, b in zip(tensors(out), tensors(expected), strict=True))


def test_a_replay_is_one_launch():
    x, w = rand(4, 64), rand(64, 64)
    with counting() as eager:
        norms(x @ w, w)
    graph, _ = captured(lambda: norms(x @ w, w))
    with counting() as replay:
        graph.replay()
    assert replay.delta.launches == 1
    assert replay.delta.graphs.replays == 1
    assert eager.delta.launches >= replay.delta.graphs.calls == replay.delta.calls >= 3
    assert replay.delta.flops == eager.delta.flops


def test_numbers_of_the_host_stay_as_they_were():
    x, factor = rand(4, 64), 2.0
    graph, out = captured(lambda: x * factor)
    factor = 3.0
    graph.replay()
    assert torch.equal(out, x * 2.0)


def test_pinned_memory_is_read_at_each_replay():
    host, x = torch.ones(4).pin_memory(), torch.zeros(4, device="npu")
    graph, out = captured(lambda: x.copy_(host, non_blocking=True) + 1)
    host.fill_(5)
    graph.replay()
    assert out.eq(6).all()


def test_graphs_share_a_pool():
    x, w = rand(512, 512), rand(512, 512)
    pool = torch.npu.graph_pool_handle()

    def one():
        return captured(lambda: ((x @ w) @ w) @ w, pool=pool)

    first, out = one()
    expected = ((x @ w) @ w) @ w
    del out
    before = reserved()
    others = [one()[0] for _ in range(3)]
    assert reserved() == before
    second, out = one()
    for graph in (first, *others, second):
        graph.replay()
    assert torch.equal(out, expected)


def test_memory_freed_inside_is_used_again():
    x = torch.ones(1 << 20, device="npu")
    graph, _ = captured(lambda: x + 1)

    def chain():
        y = x
        for _ in range(16):
            y = y + 1
        return y

    before = reserved()
    chained, out = captured(chain)
    assert reserved() - before < 8 * x.nbytes
    chained.replay()
    assert out.eq(17).all()
    graph.replay()


@pytest.mark.parametrize(
    "blank",
    [
        lambda x: torch.empty(4, 64, dtype=DTYPE, device="npu"),
        lambda x: torch.empty_strided((4, 64), (64, 1), dtype=DTYPE, device="npu"),
        torch.empty_like,
        lambda x: x.new_empty(4, 64),
    ],
    ids=["empty", "empty_strided", "empty_like", "new_empty"],
)
def test_memory_freed_inside_is_unwritten_at_each_replay(blank):
    """What the last replay left there is gone: other graphs of the pool may have written over it."""
    x, graphs, kept = rand(4, 64), [torch.npu.NPUGraph() for _ in range(2)], []
    outs = []
    for graph in graphs:
        with torch.npu.graph(graph):
            mine = blank(x)
            outs.append(mine + 0)
            mine.copy_(x)
        kept.append(mine)
        del mine
    kept[1] = None
    for _ in range(2):
        for graph in graphs:
            graph.replay()
    assert torch.equal(outs[0], x)
    assert outs[1].isnan().all()


def test_reset_gives_the_memory_back():
    x = torch.ones(1 << 22, device="npu")
    before = reserved()
    graph, out = captured(lambda: x + 1)
    assert reserved() > before
    del out
    graph.reset()
    assert reserved() == before
    with torch.npu.graph(graph):
        out = x + 2
    graph.replay()
    assert out.eq(3).all()


def test_streams_join_by_events():
    x = rand(4, 64)

    def fork():
        main, side = torch.npu.current_stream(), torch.npu.Stream()
        doubled = x * 2
        side.wait_stream(main)
        with torch.npu.stream(side):
            plus = doubled + 1
        minus = doubled - 1
        main.wait_stream(side)
        return plus * minus

    graph, out = captured(fork)
    x.copy_(rand(4, 64))
    graph.replay()
    assert torch.equal(out, (x * 2 + 1) * (x * 2 - 1))


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_graphed_callables_and_their_gradients():
    layer = torch.nn.Linear(8, 8, device="npu")
    sample = torch.randn(4, 8, device="npu", requires_grad=True)
    graphed = torch.npu.make_graphed_callables(
        lambda x: torch.relu(torch.nn.functional.linear(x, layer.weight.detach())), (sample,)
    )
    x = torch.randn(4, 8, device="npu", requires_grad=True)
    y = x.detach().clone().requires_grad_()
    graphed(x).sum().backward()
    expected = torch.relu(torch.nn.functional.linear(y, layer.weight.detach()))
    expected.sum().backward()
    assert torch.equal(graphed(x), expected)
    assert torch.equal(x.grad, y.grad)
