# SPDX-License-Identifier: Apache-2.0
"""One of the two ranks that test_hccl.py starts: rank 0 ends Python while a collective is under way whose tensor nothing else holds.

From its last function at exit on, Python never gives its lock away: Gloo's thread, which drops the tensor then, must not want the lock.
"""

import atexit
import ctypes
import os
import sys
import time
from pathlib import Path

RANK, FOLDER = int(os.environ["RANK"]), Path(sys.argv[1])
ENDING = FOLDER / "ending"
if RANK == 0:  # before torch's own functions at exit, so after them when Python ends
    atexit.register(ctypes.PyDLL(None).usleep, 2_000_000)
    atexit.register(ENDING.touch)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.npu.set_device(RANK)
dist.init_process_group("hccl", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=2)
dist.barrier()
sent = torch.ones(4, device="npu")
if RANK == 0:
    dist.all_reduce(sent, async_op=True)
    del sent
else:
    while not ENDING.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    dist.all_reduce(sent)
