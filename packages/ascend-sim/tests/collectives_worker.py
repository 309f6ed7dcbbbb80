# SPDX-License-Identifier: Apache-2.0
"""One of two ranks that join collectives of several kinds; run by test_collectives.py as `collectives_worker.py RANK STORE`."""

import sys

import torch
import torch.distributed as dist


def main(rank, store):
    dist.init_process_group("hccl", init_method=f"file://{store}", rank=rank, world_size=2)
    hosts = dist.new_group([0, 1], backend="gloo", group_desc="on hosts")
    x = torch.ones(4, device="npu")
    gathered, exchanged = torch.empty(8, device="npu"), torch.empty(8, device="npu")
    dist.all_reduce(x)
    dist.all_reduce(torch.ones(3), group=hosts)
    dist.all_gather_into_tensor(gathered, x)
    dist.all_to_all_single(exchanged, gathered)
    dist.all_to_all_single(exchanged, gathered, [4, 4], [4, 4])
    dist.all_to_all([torch.empty(4, device="npu") for _ in range(2)], [x, x])
    a, b = torch.ones(2, 4, device="npu", dtype=torch.bfloat16), torch.ones(4, 3, device="npu", dtype=torch.bfloat16)
    name = dist.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    torch.ops.npu.npu_mm_all_reduce_base(a, b, name)
    if rank == 0:
        dist.send(x, 1)
    else:
        dist.recv(x, 0)
    dist.destroy_process_group()


main(int(sys.argv[1]), sys.argv[2])
