# SPDX-License-Identifier: Apache-2.0
"""Eight processes on the simulated NPU that run cases of `moe_cases.py` once: python moe_world.py FOLDER SET [CASE ...].

One process imports torch and torch_npu and forks: eight imports would take longer than all cases together. Each rank
writes what came of each case as JSON. After a failure it ends, and the others with it, within the timeout.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import moe_cases
import torch
import torch.distributed as dist
from ascend_comm import CommGroup, Solo, TorchGroup

from ascend_moe import MoeEnv

WORLD = 8
TIMEOUT = timedelta(minutes=10)
LIMIT = 1700  # seconds for everything: a safety net, many times what it takes


class World:
    """This process's place among the others, and the groups of every set of parallel sizes."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.device = torch.device("npu", rank)
        self._groups: dict[tuple[int, ...], CommGroup | None] = {}  # None: made, and this rank is not in it
        self._mc2: dict[int, CommGroup | None] = {}
        for size, _, tp in moe_cases.SIZES:
            rows = [list(range(start, start + tp)) for start in range(0, size, tp)]
            columns = [list(range(start, size, tp)) for start in range(tp)]
            for ranks in (*rows, *columns, list(range(size))):
                if tuple(ranks) not in self._groups:
                    self._groups[tuple(ranks)] = self._make(ranks)
            if size not in self._mc2:
                self._mc2[size] = self._make(list(range(size)))
        dist.barrier(device_ids=[rank])  # a rank that ends early must not cut off others that still connect

    def _make(self, ranks: list[int]) -> CommGroup | None:
        if len(ranks) == 1:
            return Solo(ranks[0])
        made = dist.new_group(ranks, timeout=TIMEOUT)
        return TorchGroup(made) if self.rank in ranks else None

    def env(self, size: int, dp: int, tp: int, num_slots: int, **options: object) -> MoeEnv:
        """The environment of this rank among `size` = dp * tp ranks."""
        here = self.rank // tp, self.rank % tp
        return MoeEnv(
            ep=self._groups[tuple(range(size))],
            tp=self._groups[tuple(range(here[0] * tp, here[0] * tp + tp))],
            dp=self._groups[tuple(range(here[1], size, tp))],
            mc2=self._mc2[size],
            num_slots=num_slots,
            **options,
        )


def work(rank: int, folder: Path, cases: dict[str, Callable[[World], None]]) -> None:
    """All cases on one rank."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    world = World(rank)
    outcome = {}
    for name, case in cases.items():
        start = time.perf_counter()
        try:
            case(world)
            outcome[name] = "ok"
        except Exception:
            outcome[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(outcome))
        if outcome[name] != "ok":
            os._exit(1)  # closes the connections that the others wait on
        if rank == 0:
            print(f"{time.perf_counter() - start:6.2f} s  {name}", flush=True)
    dist.barrier(device_ids=[rank])
    dist.destroy_process_group()


def main(folder: Path, chosen: str, wanted: list[str]) -> None:
    """Fork the ranks and wait; end all when one has failed or time is up."""
    cases = {name: case for name, case in moe_cases.CASES[chosen].items() if not wanted or name in wanted}
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, folder, cases)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + LIMIT
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + 60)  # the others' connections to it are closed: they end too
        time.sleep(0.1)
    for process in ranks:
        process.kill()
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
