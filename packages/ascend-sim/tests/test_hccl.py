# SPDX-License-Identifier: Apache-2.0
"""The hccl backend: three real processes run every check of hccl_worker.py once, and here each check is a test."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ascend_sim.hccl import _gloo_devices

WORLD = 3
WORKER = Path(__file__).with_name("hccl_worker.py")
CHECKS = re.findall(r"^@check\ndef (\w+)", WORKER.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module", params=["immediate", "lazy"])
def outcomes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hccl")
    ranks = []
    for rank in range(WORLD):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1"}
        environment["ASCEND_SIM_STREAMS"] = request.param
        command = [sys.executable, "-W", "ignore", str(WORKER), str(folder / f"{rank}.json"), f"file://{folder}/store"]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [rank.communicate(timeout=1800)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    statuses = [rank.returncode for rank in ranks]
    assert statuses == [0] * WORLD, "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CHECKS)
def test_on_every_rank(outcomes, name):
    for rank, outcome in enumerate(outcomes):
        assert outcome[name] == "ok", f"rank {rank}: {outcome[name]}"


def test_gloo_listens_where_its_variable_says(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    assert len(_gloo_devices()) == 2
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(
        ValueError, match=r"GLOO_SOCKET_IFNAME is 'nowhere0': 'nowhere0' cannot be used .*interfaces here: .*lo"
    ):
        _gloo_devices()
