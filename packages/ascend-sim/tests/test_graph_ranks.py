# SPDX-License-Identifier: Apache-2.0
"""Collectives in graphs: real processes run graph_worker.py, with both kinds of streams; and every other test of graphs with lazy streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import run_ranks

HERE = Path(__file__).parent


@pytest.mark.parametrize("streams", ["immediate", "lazy"])
def test_in_processes(streams, tmp_path):
    run_ranks(HERE / "graph_worker.py", 2, lambda rank: [f"file://{tmp_path}/store"], ASCEND_SIM_STREAMS=streams)


def test_with_lazy_streams():
    files = [HERE / name for name in ("test_graph.py", "test_graph_rules.py", "test_graph_update.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env=os.environ | {"ASCEND_SIM_STREAMS": "lazy"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
