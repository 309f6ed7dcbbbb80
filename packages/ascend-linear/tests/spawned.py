# SPDX-License-Identifier: Apache-2.0
"""`spawn` runs a function in processes joined by gloo or hccl; `in_threads` does in threads, for worlds too large to spawn."""

import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ascend_comm import CommGroup, GroupConfig, GroupSet

TIMEOUT = timedelta(minutes=10)


# Without an NPU, real or simulated; with one that computes in float32 what hardware does in bfloat16; with a strict one.
NO_NPU = {"ASCEND_SIM": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
# Both with lazy streams: whatever reads a result without having waited for it reads NaN, or what was there before.
RELAXED = {"ASCEND_SIM_STRICT": "0", "ASCEND_SIM_STREAMS": "lazy"}
STRICT = {"ASCEND_SIM_STRICT": "1", "ASCEND_SIM_STREAMS": "lazy"}


def spawn(
    case: Callable[[int], None], world: int, folder: Path, environment: dict[str, str], limit: float = 1800
) -> None:
    """Run ``case(rank)`` in `world` processes, with CPU tensors and gloo under `NO_NPU`, else with npu tensors and hccl.

    Whatever fails or hangs in one ends all.
    """
    backend = "gloo" if environment is NO_NPU else "hccl"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        context = mp.spawn(_enter, (case, world, backend, str(folder / "store")), nprocs=world, join=False)
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{case.__name__} took more than {limit} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _enter(rank: int, case: Callable[[int], None], world: int, backend: str, store: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if backend == "hccl":
        torch.npu.set_device(rank)
        torch.set_default_device(f"npu:{rank}")
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        case(rank)
    finally:
        dist.destroy_process_group()


class ThreadGroup:
    """The collectives that the ops use, between threads: each puts its tensor in a shared list between two barriers."""

    def __init__(self, ranks: list[int], rank: int, slots: list, barrier: threading.Barrier) -> None:
        self.ranks, self.world_size, self.rank_in_group = ranks, len(ranks), ranks.index(rank)
        self._slots, self._barrier = slots, barrier

    def _exchange(self, input_: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self.rank_in_group] = input_
        self._barrier.wait(TIMEOUT.seconds)
        everyone = list(self._slots)
        self._barrier.wait(TIMEOUT.seconds)
        return everyone

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(input_), dim)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(input_)).sum(0)

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return self.all_reduce(input_).chunk(self.world_size, dim)[self.rank_in_group]

    def all_to_all(self, input_: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.chunk(self.world_size)[self.rank_in_group] for x in self._exchange(input_)])


def in_threads(case: Callable[[dict[str, CommGroup], int], None], config: GroupConfig) -> None:
    """Run ``case(groups, rank)`` in one thread for each rank of the config's world, with its groups by name."""
    world = config.topology.world_size
    of_rank: list[dict] = [{} for _ in range(world)]
    for name, family in config.families().items():
        for ranks in family:
            slots, barrier = [None] * len(ranks), threading.Barrier(len(ranks))
            for rank in ranks:
                of_rank[rank][name] = ThreadGroup(ranks, rank, slots, barrier)
    with ThreadPoolExecutor(world) as pool:
        for future in [pool.submit(case, groups, rank) for rank, groups in enumerate(of_rank)]:
            future.result()


def with_groups(case: Callable[[GroupSet, int], None], config: GroupConfig, rank: int) -> None:
    """Run ``case(groups, rank)`` in a spawned process with the groups of a config."""
    with GroupSet(config, timeout=TIMEOUT) as groups:
        # A rank whose case ends at once would close its groups while others still connect to them.
        dist.barrier(device_ids=[rank] if dist.get_backend() == "hccl" else None)
        try:
            case(groups, rank)
        except BaseException as error:
            error.add_note(f"rank {rank}, {case}, {config}")
            raise
