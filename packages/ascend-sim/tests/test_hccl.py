# SPDX-License-Identifier: Apache-2.0
"""The hccl backend: three real processes run every check of hccl_worker.py once, and here each check is a test."""

import json
import re
from pathlib import Path

import pytest
from ascend_sim.hccl import _gloo_devices
from rank_processes import run_ranks

WORLD = 3
WORKER = Path(__file__).with_name("hccl_worker.py")
CHECKS = re.findall(r"^@check\ndef (\w+)", WORKER.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module", params=["immediate", "lazy"])
def outcomes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hccl")
    run_ranks(
        WORKER,
        WORLD,
        lambda rank: [str(folder / f"{rank}.json"), f"file://{folder}/store"],
        ASCEND_SIM_STREAMS=request.param,
    )
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CHECKS)
def test_on_every_rank(outcomes, name):
    for rank, outcome in enumerate(outcomes):
        assert outcome[name] == "ok", f"rank {rank}: {outcome[name]}"


def test_a_process_may_end_before_its_collectives(tmp_path):
    """Seen in CI: "terminate called without an active exception", now and then, where a program ended right after its last collective."""
    run_ranks(Path(__file__).with_name("exit_worker.py"), 2, lambda _: [str(tmp_path)])


def test_gloo_listens_where_its_variable_says(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    assert len(_gloo_devices()) == 2
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(
        ValueError, match=r"GLOO_SOCKET_IFNAME is 'nowhere0': 'nowhere0' cannot be used .*interfaces here: .*lo"
    ):
        _gloo_devices()
