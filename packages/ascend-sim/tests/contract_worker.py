# SPDX-License-Identifier: Apache-2.0
"""One rank of the processes in which test_contracts.py runs the cases of collective operators: `contract_worker.py INIT RESULT`.

RESULT is written as `{id: {"breaks": [what the call raised, or null], "edges": [...]}}`.
"""

import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from contract_cases import Call, Group, all_cases


def outcomes(calls: Sequence[Call], group: Group) -> list[str | None]:
    """What each call raised, or None."""
    found: list[str | None] = []
    for call in calls:
        try:
            call(group)
            found.append(None)
        except Exception as error:
            found.append(str(error))
    return found


def main(init: str, result: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    npu = torch.device("npu", rank)
    torch.npu.set_device(npu)
    dist.init_process_group("hccl", init_method=init, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    singles = [dist.new_group([one], backend="hccl") for one in range(world)]
    together = dist.new_group(list(range(world)), backend="hccl")
    group = Group(
        name=together._get_backend(npu).get_hccl_comm_name(rank),
        alone=singles[rank]._get_backend(npu).get_hccl_comm_name(rank),
        rank=rank,
        world=world,
    )
    found = {
        id: {
            "breaks": outcomes(one.breaks, group) if one.break_ranks == world else [],
            "edges": outcomes(one.edges, group) if one.edge_ranks == world else [],
        }
        for id, one in all_cases().items()
        if world in (one.break_ranks, one.edge_ranks)
    }
    Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
