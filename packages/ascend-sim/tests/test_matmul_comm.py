# SPDX-License-Identifier: Apache-2.0
"""Products fused with a collective: real processes run matmul_comm_worker.py, as strict as hardware and relaxed."""

from pathlib import Path

import pytest
from rank_processes import run_ranks

WORKER = Path(__file__).with_name("matmul_comm_worker.py")


@pytest.mark.parametrize(("world", "strict"), [(2, "1"), (3, "1"), (3, "0")])
def test_in_processes(world, strict, tmp_path):
    run_ranks(WORKER, world, lambda rank: [f"file://{tmp_path}/store"], ASCEND_SIM_STRICT=strict)
