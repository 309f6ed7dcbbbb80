# SPDX-License-Identifier: Apache-2.0
"""What runs inside the spawned processes, and `spawn`, which starts them. Each rank knows all inputs by seed."""

import importlib.util
import multiprocessing
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ascend_comm import CommGroup, GroupConfig, GroupSet, Solo, Topology, TorchGroup, hccl_comm_name, wrap
from ascend_comm.group import Coordinator

TIMEOUT = timedelta(minutes=10)


def spawn(case: Callable[[int], None], world: int, folder: Path, limit: float = 1800) -> None:
    """Run ``case(rank)`` in `world` processes joined by gloo; whatever fails or hangs in one ends all.

    A fork server that has imported torch starts them: a spawned process would spend seconds on that import each.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed", "ascend_comm.groups", "pytest"])
    arguments = (case, world, str(folder / "store"))
    context = mp.start_processes(_enter, arguments, nprocs=world, join=False, start_method="forkserver")
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{case.__name__} took more than {limit} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _enter(rank: int, case: Callable[[int], None], world: int, store: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        case(rank)
    finally:
        dist.destroy_process_group()


def inputs(group: CommGroup, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """The input of each rank of the group, small integers so that sums are exact in every dtype."""
    made = []
    for rank in group.ranks:
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        made.append(torch.randint(-4, 5, shape, generator=generator).to(dtype))
    return made


def check_collectives(group: CommGroup, dtype: torch.dtype) -> None:
    """Every collective of `group` against the same thing done here with all ranks' inputs."""
    me, size = group.rank_in_group, group.world_size
    for shape in [(3,), (2 * size, 3), (size, 2 * size, 5), (0, 2)]:
        every = inputs(group, shape, dtype)
        total = sum(every[1:], every[0])
        for dim in range(-len(shape), len(shape)):
            assert torch.equal(group.all_gather(every[me].clone(), dim), torch.cat(every, dim))
            if shape[dim] % size == 0:
                part = group.reduce_scatter(every[me].clone(), dim)
                assert torch.equal(part, total.chunk(size, dim)[me] if shape[dim] else total)
                assert part.is_contiguous()
        assert torch.equal(group.all_reduce(every[me].clone()), total)
        for src in range(size):
            buffer = every[me].clone()
            assert group.broadcast(buffer, src) is buffer
            assert torch.equal(buffer, every[src])

    every = inputs(group, (2 * size, 3), dtype, seed=1)
    assert torch.equal(group.all_gather(every[me].clone()), torch.cat(every, -1)), "default dim is the last, as in vLLM"
    turned = every[me].t()
    assert torch.equal(group.all_gather(turned, 0), torch.cat([x.t() for x in every], 0)), "not contiguous"
    assert torch.equal(group.reduce_scatter(turned, 1), sum(every[1:], every[0]).t().chunk(size, 1)[me])
    assert torch.equal(
        group.all_reduce(turned.clone(memory_format=torch.preserve_format)), sum(every[1:], every[0]).t()
    )


def check_all_to_all(group: CommGroup, dtype: torch.dtype) -> None:
    me, size = group.rank_in_group, group.world_size
    every = inputs(group, (3 * size, 2), dtype, seed=2)
    expected = torch.cat([x.chunk(size)[me] for x in every])
    assert torch.equal(group.all_to_all(every[me]), expected)
    assert torch.equal(group.all_to_all(every[me].t().contiguous().t()), expected), "not contiguous"

    # Rank i sends (i + j) % 3 rows to rank j, some of them none.
    sends = [[(i + j) % 3 for j in range(size)] for i in range(size)]
    rows = [torch.arange(sum(sent) * 2, dtype=torch.int64).view(-1, 2) + 100 * i for i, sent in enumerate(sends)]
    received = [sends[i][me] for i in range(size)]
    expected = torch.cat([rows[i].split(sends[i])[me] for i in range(size)])
    assert torch.equal(group.all_to_all(rows[me], received, sends[me]), expected)
    output, pending = group.all_to_all_async(rows[me], received, sends[me])
    pending.wait()
    pending.wait()
    assert torch.equal(output, expected)


def check_asynchronous_broadcasts(group: CommGroup) -> None:
    """Several in flight, waited for in another order, with other collectives between."""
    me, size = group.rank_in_group, group.world_size
    weights = [torch.full((50, 7), float(10 * layer + me)) for layer in range(5)]
    pending = [group.broadcast_async(weight, src=layer % size) for layer, weight in enumerate(weights)]
    assert group.all_reduce(torch.ones(3)).tolist() == [size] * 3
    for layer in (4, 0, 2, 3, 1):
        pending[layer].wait()
        pending[layer].wait()
        assert bool((weights[layer] == 10 * layer + layer % size).all())


def check_refusals(group: CommGroup) -> None:
    """A caller's mistake is raised before anything is sent, so the group works on."""
    size = group.world_size
    odd = torch.zeros(2 * size + 1, 2)
    for call, message in [
        (lambda: group.all_gather(odd, 2), "dim=2"),
        (lambda: group.all_gather(torch.tensor(1.0), 0), "dim=0"),
        (lambda: group.reduce_scatter(odd, -3), "dim=-3"),
        (lambda: group.broadcast(odd, src=size), f"src={size}"),
        (lambda: group.broadcast_async(odd, src=-1), "src=-1"),
        (lambda: group.broadcast(torch.zeros(3, 2).t()), "must be contiguous"),
        (lambda: group.all_to_all(torch.tensor(1.0)), "no dimension to split"),
        (lambda: group.all_to_all(odd, input_splits=[2 * size + 1] + [0] * (size - 1)), "give both or none"),
        (lambda: group.all_to_all(odd, [1] * (size + 1), [1] * size), "output_splits="),
        (lambda: group.all_to_all(odd, [1] * size, [-1] * size), "input_splits="),
        (lambda: group.all_to_all(odd, [0] * size, [0] * size), "must add up to"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    if size > 1:
        with pytest.raises(ValueError, match="must be a multiple of the group"):
            group.reduce_scatter(odd, 0)
        with pytest.raises(ValueError, match="must be a multiple of the group"):
            group.all_to_all(odd)
    with pytest.raises(RuntimeError, match="HCCL"):
        group.comm_name()


class FakeCoordinator:
    """The shared part of vLLM's GroupCoordinator, with its signatures and its `ValueError`-free style."""

    def __init__(self, group: TorchGroup) -> None:
        self.rank_in_group, self.world_size, self.ranks = group.rank_in_group, group.world_size, group.ranks
        self.device_group, self.cpu_group = group.device_group, group.cpu_group
        self.calls: list[str] = []
        self._group = group

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        self.calls.append("all_gather")
        return self._group.all_gather(input_, dim)

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        self.calls.append("reduce_scatter")
        return self._group.reduce_scatter(input_, dim)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        self.calls.append("all_reduce")
        return self._group.all_reduce(input_)

    def broadcast(self, input_: torch.Tensor, src: int = 0):
        self.calls.append("broadcast")
        dist.broadcast(input_, src=self.ranks[src], group=self.device_group)
        return input_


def check_wrap(group: TorchGroup) -> None:
    coordinator = FakeCoordinator(group)
    assert isinstance(coordinator, Coordinator)
    assert not isinstance(coordinator, CommGroup)
    wrapped = wrap(coordinator)
    assert isinstance(wrapped, CommGroup)
    assert wrap(wrapped) is wrapped
    check_collectives(wrapped, torch.float32)
    check_all_to_all(wrapped, torch.int8)
    check_asynchronous_broadcasts(wrapped)
    assert set(coordinator.calls) == {"all_gather", "reduce_scatter", "all_reduce", "broadcast"}
    with pytest.raises(RuntimeError, match=r"only an HCCL group has a communicator name.*gloo"):
        wrapped.comm_name()


def world_of_4(rank: int) -> None:
    collectives(rank)
    lifetime(rank)


def collectives(rank: int) -> None:
    """World 4: a group of four, groups of two (adjacent, strided) and of one."""
    config = GroupConfig(
        topology=Topology(4, data_parallel=2, tensor_parallel=2),
        parallel=("tp", "dp", "pp"),
        layer_sharding=("o_proj",),
    )
    with GroupSet(config, timeout=TIMEOUT) as groups:
        assert groups["mc2"].ranks == [0, 1, 2, 3]
        assert groups["tp"].ranks == [[0, 1], [2, 3]][rank // 2]
        assert groups["dp"].ranks == [[0, 2], [1, 3]][rank % 2]
        assert groups["pp"].ranks == [rank]
        assert isinstance(groups["pp"], Solo)
        for name in ("mc2", "tp", "dp", "pp"):
            group = groups[name]
            assert group.ranks[group.rank_in_group] == rank
            assert group.world_size == len(group.ranks)
            assert isinstance(group, CommGroup)
            for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int32):
                check_collectives(group, dtype)
                check_all_to_all(group, dtype)
            check_asynchronous_broadcasts(group)
            check_refusals(group)
        for name in ("mc2", "dp"):
            check_wrap(groups[name])
        with pytest.raises(RuntimeError, match="only an HCCL group"):
            hccl_comm_name(dist.group.WORLD)
        others = [[2, 3], [0, 1]][rank // 2]
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        with pytest.raises(ValueError, match=f"rank {rank} of the world is not in it"):
            TorchGroup(halves[others[0] // 2])


def lifetime(rank: int) -> None:
    """World 4: what is shared, what is checked before anything is created, and what is left after closing."""
    topology = Topology(4, data_parallel=4)
    config = GroupConfig(
        topology=topology, dynamic_eplb=True, lmhead_tp=2, mlp_tp=2, embed_tp=1, layer_sharding=("o_proj",)
    )
    before = len(dist.distributed_c10d._world.pg_map)

    enough = 2 * (200 + 100 + 200 + 200) * 2**20
    with pytest.raises(MemoryError, match=r"do not fit: rank 2 lacks 10 MB \(this rank needs 1400 MB") as caught:
        GroupSet(config, free_memory=enough - 10 * 2**20 if rank == 2 else enough)
    assert "HCCL_BUFFSIZE" in str(caught.value)
    assert len(dist.distributed_c10d._world.pg_map) == before

    with pytest.raises(ValueError, match=r"topology.world_size=2: torch.distributed runs 4 ranks"):
        GroupSet(GroupConfig(topology=Topology(2)))
    with pytest.raises(ValueError, match="backend='nccl': must be one of hccl, gloo"):
        GroupSet(config, backend="nccl")
    if not importlib.util.find_spec("torch_npu"):
        with pytest.raises(RuntimeError, match="backend 'hccl' needs torch_npu: pip install torch-npu"):
            GroupSet(GroupConfig(topology=topology, mc2=False, mlp_tp=4), backend="hccl")
    assert len(dist.distributed_c10d._world.pg_map) == before

    groups = GroupSet(config, free_memory=enough)
    assert list(groups) == list(config.families())
    assert len(groups) == 6
    assert groups["lmhead_tp"] is groups["mlp_tp"]
    assert groups["mc2"] is not groups["dynamic_eplb"]
    assert groups["shard_weight"] is not groups["mc2"]
    assert isinstance(groups["embed_tp"], Solo)
    assert groups.get("otp") is None
    assert groups["mc2"].cpu_group is groups["mc2"].device_group
    assert [handle.names for handle in groups.handles] == [
        ("mc2",), ("dynamic_eplb",), ("lmhead_tp", "mlp_tp"), ("shard_weight",),
    ]  # fmt: skip
    assert len(dist.distributed_c10d._world.pg_map) == before + 4
    # A collective in each lane at once: the slow one does not disturb the others.
    moving = torch.full((1000,), float(rank))
    pending = groups["shard_weight"].broadcast_async(moving, src=3)
    assert groups["mc2"].all_reduce(torch.ones(1)).item() == 4
    pending.wait()
    assert moving[0] == 3

    groups.close()
    groups.close()
    assert len(dist.distributed_c10d._world.pg_map) == before
    with pytest.raises(RuntimeError, match="group 'mc2' of a closed GroupSet"):
        groups["mc2"]

    survivors = GroupSet(config)
    dist.destroy_process_group()
    survivors.close()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def flashcomm2(rank: int) -> None:
    """World 6 (so that k and G differ): o_proj through OTP and ODP equals the dense product, for every k, padded."""
    tp, heads, width, tokens = 6, 3, 5, 13
    generator = torch.Generator().manual_seed(7)
    # Whole numbers, of which every sum is exact in any order.
    x = torch.randint(-9, 10, (tokens, tp * heads), generator=generator).double()
    weight = torch.randint(-9, 10, (tp * heads, width), generator=generator).double()
    dense = x @ weight
    mine = torch.nn.functional.pad(x.view(tokens, tp, heads)[:, rank], (0, 0, 0, -tokens % tp))
    rows = mine.shape[0]
    for k in (1, 2, 3):
        topology = Topology(tp, tensor_parallel=tp)
        with GroupSet(GroupConfig(topology=topology, parallel=("tp",), flashcomm2=k, mc2=False)) as groups:
            block = tp // k
            chunks = mine.view(tp, rows // tp, heads)[torch.tensor(topology.flashcomm2_token_order(k)).flatten()]
            odp, otp = groups["flashcomm2_odp"], groups.get("flashcomm2_otp")
            received = odp.all_to_all(chunks.reshape(rows, heads)).view(block, rows // block, heads)
            shard = rank // block
            piece = weight.view(k, block * heads, width)[shard]
            out = received.transpose(0, 1).reshape(rows // block, block * heads) @ piece
            if otp is not None:
                assert otp.rank_in_group == shard
                out = otp.reduce_scatter(out, 0)
            full = groups["tp"].all_gather(out, 0)[:tokens]
            assert torch.equal(full, dense)


def fail_on_rank_1(rank: int) -> None:
    """The other rank would sleep on: `spawn` has to end it."""
    assert rank != 1, "on purpose"
    time.sleep(100_000)
