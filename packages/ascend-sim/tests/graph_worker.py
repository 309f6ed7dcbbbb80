# SPDX-License-Identifier: Apache-2.0
"""One rank of the processes that test_graph_ranks.py starts: collectives, and products fused with them, in graphs."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch_npu
from ascend_sim.counters import counting

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NPU = torch.device("npu", RANK)


def calls(name):
    """Collectives as functions of x `[4, 256]` and weight `[256, 16]` that return their results."""

    def all_reduce(x, weight):
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    def later(x, weight):
        y = x * 2
        work = dist.all_reduce(y, async_op=True)
        z = x @ weight
        work.wait()
        return y @ weight + z

    def all_gather(x, weight):
        y = x.new_empty(WORLD * 4, 256)
        dist.all_gather_into_tensor(y, x + 1)
        return y * 2

    def reduce_scatter(x, weight):
        y = x.new_empty(4 // WORLD, 256)
        dist.reduce_scatter_tensor(y, x + 1)
        return y * 2

    def broadcast(x, weight):
        y = x + RANK
        dist.broadcast(y, src=1)
        return y * 2

    def all_to_all(x, weight):
        y = torch.empty_like(x)
        dist.all_to_all_single(y, x + RANK)
        return y * 2

    def mm_all_reduce(x, weight):
        return torch_npu.npu_mm_all_reduce_base(x, weight, name) + 1

    return all_reduce, later, all_gather, reduce_scatter, broadcast, all_to_all, mm_all_reduce


def replays_that_python_starts(x):
    """Replays that run where torch_npu holds Python's lock (`ExternalEvent.record`), after collectives of tensors that Python drops.

    A thread of gloo drops the last reference then, which needs the lock, and the collective of the replay waits for that thread.
    """
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    with torch.npu.stream(stream):
        event = torch.npu.ExternalEvent()
        with torch.npu.graph(graph, stream=stream):
            event.wait(stream)
            event.reset(stream)
            y = x.float() * 2
            for _ in range(4):
                dist.all_reduce(y)
        other = torch.npu.Stream()
        for _ in range(200):
            dist.all_reduce(x.float())
            graph.replay()
            event.record(other)
        stream.synchronize()
        expected = x.float() * 2
        for _ in range(4):
            dist.all_reduce(expected)
        assert torch.equal(y, expected)


def main() -> None:
    torch.npu.set_device(NPU)
    dist.init_process_group("hccl", init_method=sys.argv[1], rank=RANK, world_size=WORLD)
    name = dist.group.WORLD._get_backend(NPU).get_hccl_comm_name(RANK)
    generator = torch.Generator().manual_seed(RANK)
    x = torch.randn(4, 256, generator=generator).to(torch.bfloat16).npu()
    weight = torch.randn(256, 16, generator=generator).to(torch.bfloat16).npu()
    for call in calls(name):
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            out = call(x, weight)
        for _ in range(2):
            x.copy_(torch.randn(4, 256, generator=generator).to(torch.bfloat16))
            with counting() as replay:
                graph.replay()
            with counting() as eager:
                expected = call(x, weight)
            assert torch.equal(out, expected), call.__name__
            assert replay.delta.collectives == eager.delta.collectives
            assert replay.delta.launches == 1
    replays_that_python_starts(x)
    stream = torch.npu.current_stream()
    refused = pytest.raises(RuntimeError, match="c10d::alltoall_base_ takes sizes of splits on the host")
    with refused, torch.npu.graph(torch.npu.NPUGraph()):
        dist.all_to_all_single(torch.empty_like(x), x, [1, 3] if RANK else [3, 1], [1, 3] if RANK else [3, 1])
    torch.npu.set_stream(stream)
    dist.destroy_process_group()


main()
sys.stdout.flush()
os._exit(
    0
)  # graphs hold the group: a thread of gloo may still drop a tensor that Python knows, which ends a Python that ends with an error
