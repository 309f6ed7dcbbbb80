# SPDX-License-Identifier: Apache-2.0
"""One rank of the processes that test_hccl.py starts: runs every check and writes what came of each as JSON.

Each rank r holds data(r), so every rank can compute by itself what a collective must give.
"""

import gc
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from ascend_sim import counters, hccl

CHECKS = {}
WORLD = int(os.environ.get("WORLD_SIZE", "3"))
RANK = int(os.environ.get("RANK", "0"))
NPU = torch.device("npu", RANK)
OTHERS = [rank for rank in range(WORLD) if rank != RANK]


def check(function):
    CHECKS[function.__name__] = function
    return function


def data(rank, *shape, dtype=torch.float32):
    shape = shape or (2, 3)
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    return (numbers % 7 + rank + 1).to(dtype)


def mine(*shape, dtype=torch.float32):
    return data(RANK, *shape, dtype=dtype).to(NPU)


def everyone(*shape, dtype=torch.float32):
    return [data(rank, *shape, dtype=dtype) for rank in range(WORLD)]


def same(npu, cpu):
    assert npu.device == NPU, npu.device
    torch.testing.assert_close(npu.cpu(), cpu)


def sent(work, name):
    """(calls, bytes) of one collective in what was counted."""
    found = [count for (op, _), count in work.delta.collectives.items() if op == name]
    assert len(found) == 1, work.delta.collectives
    return found[0].calls, found[0].bytes


# all-reduce


def reduced(op, parts):
    stacked = torch.stack(parts)
    if op == dist.ReduceOp.SUM:
        return stacked.sum(0).to(stacked.dtype)
    if op == dist.ReduceOp.PRODUCT:
        return stacked.prod(0).to(stacked.dtype)
    return stacked.amin(0) if op == dist.ReduceOp.MIN else stacked.amax(0)


@check
def all_reduce_every_operation_and_dtype():
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int8, torch.uint8):
            tensor = mine(dtype=dtype)
            dist.all_reduce(tensor, op=op)
            same(tensor, reduced(op, everyone(dtype=dtype)))


@check
def all_reduce_counts_its_bytes():
    tensor = mine(6, 10)
    with counters.counting() as work:
        dist.all_reduce(tensor)
    assert sent(work, "allreduce_") == (1, 2 * 240 * (WORLD - 1) // WORLD)


@check
def average():
    tensor = mine()
    dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
    same(tensor, sum(everyone()) / WORLD)


@check
def all_reduce_of_a_view():
    whole = mine(4, 6)
    dist.all_reduce(whole[1:3])
    expected = data(RANK, 4, 6)
    expected[1:3] = sum(everyone(4, 6))[1:3]
    same(whole, expected)


@check
def all_reduce_coalesced():
    tensors = [mine(), mine(5)]
    dist.all_reduce_coalesced(tensors)
    same(tensors[0], sum(everyone()))
    same(tensors[1], sum(everyone(5)))


@check
def asynchronous_work_keeps_its_tensors():
    total, source = mine(1000, 100), mine(300, 100)
    gathered = torch.empty(WORLD * 300, 100, device=NPU)
    dist.barrier()
    if RANK:
        time.sleep(0.5)  # so rank 0's work cannot be done before it lets go of its tensor
    reduce_work = dist.all_reduce(total, async_op=True)
    gather_work = dist.all_gather_into_tensor(gathered, source, async_op=True)
    address, shape = source.data_ptr(), source.shape
    del source
    gc.collect()
    overwritten = [torch.full(shape, -1.0, device=NPU) for _ in range(4)]  # would take the freed memory
    if RANK == 0:
        assert not gather_work.is_completed()
        assert address not in {tensor.data_ptr() for tensor in overwritten}
    reduce_work.wait()
    gather_work.wait()
    same(total, sum(everyone(1000, 100)))
    same(gathered, torch.cat(everyone(300, 100)))


@check
def asynchronous_output_may_be_dropped():
    work = dist.all_reduce(torch.ones(200_000, device=NPU), async_op=True)
    gc.collect()
    torch.npu.empty_cache()
    work.wait()
    dist.barrier()


# gathering


@check
def all_gather_list():
    parts = [torch.empty(2, 3, device=NPU) for _ in range(WORLD)]
    with counters.counting() as work:
        dist.all_gather(parts, mine())
    for part, expected in zip(parts, everyone(), strict=True):
        same(part, expected)
    assert sent(work, "allgather_") == (1, 24 * (WORLD - 1))


@check
def all_gather_into_one_tensor():
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        out = torch.empty(WORLD * 2, 3, device=NPU, dtype=dtype)
        dist.all_gather_into_tensor(out, mine(dtype=dtype))
        same(out, torch.cat(everyone(dtype=dtype)))
    out = torch.empty(WORLD, 2, 3, device=NPU)
    with counters.counting() as work:
        dist.all_gather_into_tensor(out, mine())
    same(out, torch.stack(everyone()))
    assert sent(work, "_allgather_base_") == (1, 24 * (WORLD - 1))


@check
def all_gather_of_a_transposed_tensor():
    out = torch.empty(WORLD * 3, 2, device=NPU)
    dist.all_gather_into_tensor(out, mine().t().contiguous())
    same(out, torch.cat([part.t() for part in everyone()]))


@check
def gather_to_one():
    parts = [torch.empty(2, 3, device=NPU) for _ in range(WORLD)] if RANK == 1 else None
    dist.gather(mine(), parts, dst=1)
    if RANK == 1:
        for part, expected in zip(parts, everyone(), strict=True):
            same(part, expected)


@check
def objects():
    found = [None] * WORLD
    dist.all_gather_object(found, {"rank": RANK})
    assert found == [{"rank": rank} for rank in range(WORLD)]
    box = [("from", RANK)]
    dist.broadcast_object_list(box, src=1)
    assert box == [("from", 1)]
    gathered = [None] * WORLD if RANK == 0 else None
    dist.gather_object(RANK * 10, gathered, dst=0)
    assert gathered == ([rank * 10 for rank in range(WORLD)] if RANK == 0 else None)
    scattered = [None]
    dist.scatter_object_list(scattered, [f"to {rank}" for rank in range(WORLD)] if RANK == 0 else None, src=0)
    assert scattered == [f"to {RANK}"]


# scattering


@check
def reduce_scatter_one_tensor():
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(2, 3, device=NPU, dtype=dtype)
        with counters.counting() as work:
            dist.reduce_scatter_tensor(out, mine(WORLD * 2, 3, dtype=dtype))
        same(out, reduced(dist.ReduceOp.SUM, everyone(WORLD * 2, 3, dtype=dtype))[RANK * 2 : RANK * 2 + 2])
        assert sent(work, "_reduce_scatter_base_") == (1, 6 * dtype.itemsize * (WORLD - 1))


@check
def reduce_scatter_by_a_leading_axis():
    out = torch.empty(2, 3, device=NPU)
    dist.reduce_scatter_tensor(out, mine(WORLD, 2, 3))
    same(out, sum(everyone(WORLD, 2, 3))[RANK])


@check
def reduce_scatter_list():
    out = torch.empty(2, 3, device=NPU)
    dist.reduce_scatter(out, list(mine(WORLD * 2, 3).split(2)), op=dist.ReduceOp.MAX)
    same(out, torch.stack(everyone(WORLD * 2, 3)).amax(0)[RANK * 2 : RANK * 2 + 2])


@check
def scatter_from_one():
    out = torch.empty(2, 3, device=NPU)
    with counters.counting() as work:
        dist.scatter(out, [tensor.to(NPU) for tensor in everyone()] if RANK == 1 else None, src=1)
    same(out, data(RANK))
    assert sent(work, "scatter_") == (1, 24 * (WORLD - 1) if RANK == 1 else 0)


@check
def broadcast_and_reduce():
    tensor = mine()
    with counters.counting() as work:
        dist.broadcast(tensor, src=2)
    same(tensor, data(2))
    assert sent(work, "broadcast_") == (1, 24 if RANK == 2 else 0)
    tensor = mine()
    with counters.counting() as work:
        dist.reduce(tensor, dst=1)
    if RANK == 1:
        same(tensor, sum(everyone()))
    assert sent(work, "reduce_") == (1, 0 if RANK == 1 else 24)


# all to all


@check
def all_to_all_equal():
    out = torch.empty(WORLD * 2, 3, device=NPU)
    with counters.counting() as work:
        dist.all_to_all_single(out, mine(WORLD * 2, 3))
    same(out, torch.cat([part[RANK * 2 : RANK * 2 + 2] for part in everyone(WORLD * 2, 3)]))
    assert sent(work, "alltoall_base_") == (1, 24 * (WORLD - 1))


@check
def all_to_all_with_splits():
    rows = [[(source + target) % 3 for target in range(WORLD)] for source in range(WORLD)]  # some are 0
    inputs = [data(source, sum(rows[source]), 4) for source in range(WORLD)]
    out_splits = [rows[source][RANK] for source in range(WORLD)]
    out = torch.empty(sum(out_splits), 4, device=NPU)
    with counters.counting() as work:
        dist.all_to_all_single(out, inputs[RANK].to(NPU), out_splits, rows[RANK])
    same(out, torch.cat([inputs[source].split(rows[source])[RANK] for source in range(WORLD)]))
    assert sent(work, "alltoall_base_") == (1, 16 * sum(rows[RANK][other] for other in OTHERS))


@check
def all_to_all_lists():
    outputs = [torch.empty(RANK + 1, 2, device=NPU) for _ in range(WORLD)]
    dist.all_to_all(outputs, [mine(target + 1, 2) for target in range(WORLD)])
    for source, output in enumerate(outputs):
        same(output, data(source, RANK + 1, 2))


@check
def all_to_all_of_nothing():
    out = torch.empty(0, 4, device=NPU)
    dist.all_to_all_single(out, torch.empty(0, 4, device=NPU), [0] * WORLD, [0] * WORLD)
    assert out.shape == (0, 4)


# point to point


@check
def send_and_receive():
    if RANK == 0:
        with counters.counting() as work:
            dist.send(mine(), dst=1)
        assert sent(work, "send") == (1, 24)
    if RANK == 1:
        tensor = torch.empty(2, 3, device=NPU)
        assert dist.recv(tensor, src=0) == 0
        same(tensor, data(0))


@check
def send_and_receive_asynchronously():
    following, previous = (RANK + 1) % WORLD, (RANK - 1) % WORLD
    received = torch.empty(500, 100, device=NPU)
    works = [dist.isend(mine(500, 100), dst=following), dist.irecv(received, src=previous)]
    gc.collect()
    for work in works:
        work.wait()
    same(received, data(previous, 500, 100))


@check
def batches_of_sends_and_receives():
    received = {rank: torch.empty(2, 3, device=NPU) for rank in OTHERS}
    operations = [dist.P2POp(dist.isend, mine(), rank) for rank in OTHERS]
    operations += [dist.P2POp(dist.irecv, received[rank], rank) for rank in OTHERS]
    with counters.counting() as counted:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    for rank, tensor in received.items():
        same(tensor, data(rank))
    assert sent(counted, "send") == (len(OTHERS), 24 * len(OTHERS))


@check
def barriers():
    dist.barrier()
    dist.barrier(async_op=True).wait()
    dist.barrier(device_ids=[RANK])


@check
def coalesced():
    outs = [[torch.empty(2, 3, device=NPU), torch.empty(5, device=NPU)] for _ in range(WORLD)]
    dist.distributed_c10d.all_gather_coalesced(outs, [mine(), mine(5)])
    for out, first, second in zip(outs, everyone(), everyone(5), strict=True):
        same(out[0], first)
        same(out[1], second)
    reduced, gathered = [mine(), mine(5)], [torch.empty(WORLD, 2, 3, device=NPU), torch.empty(WORLD * 5, device=NPU)]
    with dist.distributed_c10d._coalescing_manager():
        for tensor in reduced:
            dist.all_reduce(tensor)
    with dist.distributed_c10d._coalescing_manager():
        dist.all_gather_into_tensor(gathered[0], mine())
        dist.all_gather_into_tensor(gathered[1], mine(5))
    same(reduced[0], sum(everyone()))
    same(reduced[1], sum(everyone(5)))
    same(gathered[0], torch.stack(everyone()))
    same(gathered[1], torch.cat(everyone(5)))


@check
def functional_collectives():
    import torch.distributed._functional_collectives as funcol

    group = dist.group.WORLD
    same(funcol.wait_tensor(funcol.all_reduce(mine(), "sum", group)), sum(everyone()))
    same(funcol.wait_tensor(funcol.all_gather_tensor(mine(), 0, group)), torch.cat(everyone()))


# groups


@check
def backends_and_names():
    world = dist.group.WORLD
    backend = world._get_backend(torch.device("npu"))
    assert type(backend) is hccl.SimulatedHCCL
    gc.collect()
    assert world._get_backend(torch.device("npu")) is backend
    assert dist.get_backend() == "hccl"
    twin = dist.new_group(list(range(WORLD)), backend="hccl", timeout=timedelta(minutes=10))
    names = [group._get_backend(torch.device("npu")).get_hccl_comm_name(RANK) for group in (world, twin)]
    assert names[0] != names[1]
    assert all(isinstance(name, str) and 0 < len(name) < 128 for name in names)
    found = [None] * WORLD
    dist.all_gather_object(found, names)
    assert all(other == names for other in found)
    assert hccl.group_of(names[1]) is twin._get_backend(torch.device("npu"))
    for wrong in (-1, (RANK + 1) % WORLD):
        with pytest.raises(
            ValueError, match=f"rank is {wrong}; it must be this process's rank in the whole job, {RANK} "
        ):
            backend.get_hccl_comm_name(wrong)
    assert backend.get_hccl_comm_name(RANK + torch.npu.device_count()) == names[0]  # the same device, on another host
    dist.destroy_process_group(twin)
    with pytest.raises(RuntimeError, match=names[1]):
        hccl.group_of(names[1])


@check
def sub_groups():
    pairs = dist.new_group([0, 2], backend="hccl", timeout=timedelta(minutes=10))
    alone = [dist.new_group([rank], backend="hccl", timeout=timedelta(minutes=10)) for rank in range(WORLD)][RANK]
    single = mine()
    with counters.counting() as work:
        dist.all_reduce(single, group=alone)
    same(single, data(RANK))
    assert work.delta.bytes == 0
    if RANK in (0, 2):
        tensor = mine()
        dist.all_reduce(tensor, group=pairs)
        same(tensor, data(0) + data(2))
        out = torch.empty(4, 3, device=NPU)
        dist.all_gather_into_tensor(out, mine(), group=pairs)
        same(out, torch.cat([data(0), data(2)]))
        tensor = mine()
        dist.broadcast(tensor, src=2, group=pairs)
        same(tensor, data(2))
        parts = [torch.empty(2, 3, device=NPU) for _ in range(2)] if RANK == 2 else None
        dist.gather(mine(), parts, dst=2, group=pairs)
        assert RANK == 0 or [part.tolist() for part in parts] == [data(0).tolist(), data(2).tolist()]
    dist.barrier()


@check
def groups_are_counted_apart():
    group = dist.new_group(
        list(range(WORLD)), backend="hccl", group_desc="expert parallel", timeout=timedelta(minutes=10)
    )
    counters.reset()
    dist.all_reduce(mine(), group=group)
    dist.all_reduce(mine())
    counted = counters.snapshot().collectives
    assert counted["allreduce_", "expert parallel"].calls == 1
    assert sum(count.calls for (name, _), count in counted.items() if name == "allreduce_") == 2


@check
def mixed_group_of_cpu_and_npu():
    group = dist.new_group(list(range(WORLD)), backend="cpu:gloo,npu:hccl", timeout=timedelta(minutes=10))
    npu, cpu = mine(), data(RANK)
    dist.all_reduce(npu, group=group)
    dist.all_reduce(cpu, group=group)
    same(npu, sum(everyone()))
    assert torch.equal(cpu, sum(everyone()))
    assert isinstance(group._get_backend(torch.device("npu")), hccl.SimulatedHCCL)
    assert not isinstance(group._get_backend(torch.device("cpu")), hccl.SimulatedHCCL)


@check
def groups_as_vllm_makes_them():
    """GroupCoordinator: the same ranks once as hccl and once as gloo, a tensor over one and its shape over the other."""
    for ranks in ([0, 1], [2]):
        device_group = dist.new_group(ranks, backend="hccl", timeout=timedelta(minutes=10))
        cpu_group = dist.new_group(ranks, backend="gloo", timeout=timedelta(minutes=10))
        if RANK not in ranks or len(ranks) == 1:
            continue
        box = [None] * 2
        dist.all_gather_object(box, (2, RANK + 1), group=cpu_group)
        outputs = [torch.empty(shape, device=NPU) for shape in box]
        works = [
            dist.irecv(outputs[1 - RANK], src=1 - RANK, group=device_group),
            dist.isend(mine(2, RANK + 1), dst=1 - RANK, group=device_group),
        ]
        for work in works:
            work.wait()
        same(outputs[1 - RANK], data(1 - RANK, 2, 2 - RANK))
    dist.barrier()


@check
def cpu_tensors_have_no_backend():
    with pytest.raises(RuntimeError, match="cpu"):
        dist.all_reduce(torch.ones(1))


def main(results: Path, init: str) -> None:
    torch.npu.set_device(NPU)
    dist.init_process_group("hccl", init_method=init, rank=RANK, world_size=WORLD, timeout=timedelta(minutes=10))
    outcome = {}
    for name, function in CHECKS.items():
        try:
            function()
            outcome[name] = "ok"
        except Exception:
            outcome[name] = traceback.format_exc()
        results.write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
