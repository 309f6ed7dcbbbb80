# SPDX-License-Identifier: Apache-2.0
"""Tokens to experts of other ranks and back: real processes run moe_exchange_worker.py, as strict as hardware and relaxed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("moe_exchange_worker.py")


@pytest.mark.parametrize(("world", "strict"), [(2, "1"), (4, "1"), (2, "0")])
def test_in_processes(world, strict, tmp_path):
    ranks = []
    for rank in range(world):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(WORKER), f"file://{tmp_path}/store"]
        ranks.append(
            subprocess.Popen(
                command,
                env=environment | {"ASCEND_SIM_STRICT": strict},
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
