# SPDX-License-Identifier: Apache-2.0
"""Layers over real processes: eight of them run every case of moe_cases.py once, and here each case is a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import moe_cases
import pytest

WORLD = 8
SCRIPT = Path(__file__).with_name("moe_world.py")


def run_cases(chosen, folder):
    """What came of each case of a set on each rank, and what the processes said."""
    # With lazy streams whatever reads a result without having waited for it reads NaN.
    environment = os.environ | {"ASCEND_SIM_STREAMS": "lazy", "OMP_NUM_THREADS": "1"}
    environment["ASCEND_SIM_STRICT"] = "1" if chosen == "strict" else "0"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    found = [folder / f"{rank}.json" for rank in range(WORLD)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in found], done.stdout + done.stderr


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return run_cases("exact", tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    return run_cases("strict", tmp_path_factory.mktemp("strict"))


def check(outcomes, case):
    ranks, said = outcomes
    failed = {rank: outcome.get(case) for rank, outcome in enumerate(ranks) if outcome.get(case) != "ok"}
    # After a failure the other ranks only report that their connection was closed.
    causes = [error for error in failed.values() if error and "Connection closed" not in error]
    assert not failed, "\n".join(causes) or f"not run, an earlier case failed: {failed}\n{said[-3000:]}"


@pytest.mark.parametrize("case", moe_cases.CASES["exact"])
def test_in_float32(exact, case):
    check(exact, case)


@pytest.mark.parametrize("case", moe_cases.CASES["strict"])
def test_as_strict_as_hardware(strict, case):
    check(strict, case)
