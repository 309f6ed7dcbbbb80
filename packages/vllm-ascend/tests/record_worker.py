# SPDX-License-Identifier: Apache-2.0
"""One of two ranks that record one step of an interval of many; `record_worker.py RANK FOLDER [early]`, where with "early" rank 1 closes nothing."""

import sys

import torch
import torch.distributed as dist
from ascend_eplb import spread
from vllm_ascend.config import EplbConfig
from vllm_ascend.eplb.record import LoadRecorder


def main(rank, folder, early):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    counts = [torch.zeros(4, dtype=torch.int64, device="npu") for _ in range(2)]
    config = EplbConfig(expert_load_record_path=f"{folder}/load.jsonl", expert_heat_collection_interval=100)
    recorder = LoadRecorder(config, [spread(num_experts=8, ranks=2)] * 2, counts, Hosts(rank), writes=rank == 0)
    for layer, count in enumerate(counts):
        count += torch.tensor([1, 0, rank, layer], device="npu")
    recorder.step()
    if not (early and rank == 1):
        recorder.close()


class Hosts:
    """As much of a group as the recorder uses at the end."""

    world_size = 2

    def __init__(self, rank):
        self.rank_in_group, self.cpu_group = rank, dist.group.WORLD


main(int(sys.argv[1]), sys.argv[2], len(sys.argv) > 3)
