# SPDX-License-Identifier: Apache-2.0
"""Tokens to experts of other ranks and back: real processes run moe_exchange_worker.py, as strict as hardware and relaxed."""

from pathlib import Path

import pytest
from rank_processes import run_ranks

WORKER = Path(__file__).with_name("moe_exchange_worker.py")


@pytest.mark.parametrize(("world", "strict"), [(2, "1"), (4, "1"), (2, "0")])
def test_in_processes(world, strict, tmp_path):
    run_ranks(WORKER, world, lambda rank: [f"file://{tmp_path}/store"], ASCEND_SIM_STRICT=strict)
