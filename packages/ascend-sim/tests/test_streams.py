# SPDX-License-Identifier: Apache-2.0
"""Lazy streams, which a process has or has not: one process runs every check of streams_worker.py, and here each is a test."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("streams_worker.py")
CHECKS = re.findall(r"^@check\ndef (\w+)", WORKER.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder / "results.json"), f"file://{folder}/store"]
    environment = os.environ | {"ASCEND_SIM_STREAMS": "lazy"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CHECKS)
def test_lazy(outcomes, name):
    assert outcomes[name] == "ok", outcomes[name]


def test_immediate():
    x, side = torch.ones(3, device="npu"), torch.npu.Stream()
    with torch.npu.stream(side):
        y = x + 1
    assert y.eq(2).all()
