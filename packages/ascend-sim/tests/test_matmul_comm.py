# SPDX-License-Identifier: Apache-2.0
"""Products fused with a collective: real processes run matmul_comm_worker.py, as strict as hardware and relaxed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("matmul_comm_worker.py")


@pytest.mark.parametrize(("world", "strict"), [(2, "1"), (3, "1"), (3, "0")])
def test_in_processes(world, strict, tmp_path):
    ranks = []
    for rank in range(world):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "ASCEND_SIM_STRICT": strict}
        command = [sys.executable, "-W", "ignore", str(WORKER), f"file://{tmp_path}/store"]
        ranks.append(
            subprocess.Popen(
                command,
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [rank.communicate(timeout=1800)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
