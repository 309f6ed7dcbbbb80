# SPDX-License-Identifier: Apache-2.0
"""Experts that move between ranks on the simulated NPU, without an engine: `eplb_world.py` runs the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ascend_eplb import Placement, balancedness, load_placement

FAST = {
    "expert_heat_collection_interval": 1,
    "algorithm_execution_interval": 1,
    "eplb_policy_type": "random",
    "load_window": 2,
}


@pytest.fixture
def world(tmp_path):
    """A function that runs a case and returns what came of it on each rank; None for a rank that was killed."""

    def run(case, ranks, **options):
        script = Path(__file__).with_name("eplb_world.py")
        options["config"] = FAST | options.get("config", {})
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), case, str(ranks), json.dumps(options)],
            env=os.environ | ({"ASCEND_SIM_SOC": "Ascend910_9391"} if options.get("method") == "mc2" else {}), capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = [tmp_path / f"{rank}.json" for rank in range(ranks)]
        outcomes = [json.loads(file.read_text()) if file.exists() else None for file in files]
        for outcome in outcomes:
            assert "error" not in (outcome or {}), outcome["error"]
        return outcomes

    return run


@pytest.mark.parametrize(
    ("ranks", "rebalances", "options"),
    [
        (4, 10, {}),
        (4, 5, {"method": "all-to-all-v", "redundant": 8, "slow": True}),
        (3, 5, {"quantised": True, "method": "mc2", "redundant": 2}),
        (2, 5, {"quantised": True, "method": "all-to-all-v", "redundant": 0, "config": {"move_buffer_experts": 1}}),
    ],
    ids=["all-gather", "all-to-all-v-slow-ranks", "w8a8-mc2", "w8a8-no-redundancy"],
)
def test_outputs_stay_the_same_while_experts_move(world, ranks, rebalances, options):
    """Before, during and after: in every step each rank's outputs are those of the first step, and every slot holds its expert, whole."""
    outcomes = world("steps", ranks, rebalances=rebalances, **options)
    first = outcomes[0]
    assert first["rebalances"] >= rebalances
    assert first["moves"] > 0
    assert first["placements"] > rebalances  # a rebalance has a placement in force after each of its batches
    for outcome in outcomes:
        assert outcome["failures"] == 0
        for name in ("steps", "rebalances", "moves", "bytes", "placements", "final", "intervals"):
            assert outcome[name] == first[name], name
    one_step = ranks * 24 * 2 * 3  # tokens, experts of each, layers
    assert np.array(first["heat"]).sum() % one_step == 0
    assert np.array(first["heat"]).any()


def test_balance_improves_and_the_placement_is_written(world, tmp_path):
    path = tmp_path / "map.json"
    config = {"eplb_policy_type": "incremental", "expert_map_record_path": str(path), "move_budget": 1.0}
    first = world("steps", 4, rebalances=1, config=config)[0]
    final = Placement(np.array(first["final"], np.int32), 16, (5, 6, 7))
    written = load_placement(path, ranks=4, num_experts=16)
    assert np.array_equal(written.physical_to_logical, final.physical_to_logical)
    assert written.layer_ids == (5, 6, 7)
    load = np.zeros((3, 16))
    import torch

    for layer in range(3):
        for rank in range(4):
            mine = torch.Generator().manual_seed(100 + 10 * layer + rank)
            torch.randn(24, 64, generator=mine)
            for _ in range(24):
                load[layer, torch.randperm(16, generator=mine)[:2].numpy()] += 1
    from ascend_eplb import spread

    assert balancedness(final, load).mean() > balancedness(spread(num_experts=16, ranks=4, redundant=4, layers=3), load).mean()  # fmt: skip


@pytest.mark.parametrize(
    ("program", "seconds", "reason"),
    [
        ("", 60, "failed"),
        ("import time; time.sleep(600)", 1, "failed"),
    ],
    ids=["dies", "hangs"],
)
def test_steps_go_on_without_a_planner(world, program, seconds, reason):
    outcomes = world("steps", 2, failures=2, planner=program or "pass", plan_seconds=seconds)
    assert outcomes[0]["dropped"][reason] >= 2
    assert outcomes[0]["failures"] >= 2
    assert all(outcome["moves"] == 0 and outcome["placements"] == 1 for outcome in outcomes)


def test_a_slot_that_does_not_hold_its_expert_is_found(world):
    said = [outcome["said"] for outcome in world("half_moved", 2)]
    assert any("does not hold the weights of expert" in one for one in said), said


@pytest.mark.parametrize(
    ("how", "said"), [("killed", "RuntimeError: "), ("stops", "TimeoutError: dynamic EPLB has waited 3 seconds for ")]
)
def test_a_rank_that_is_gone_ends_the_others(world, how, said):
    config = {"move_buffer_experts": 1, "verify_moves": False}
    first, lost, third = world("lost", 3, how=how, limit=3.0, redundant=2, config=config)
    assert lost is None
    for outcome in (first, third):
        assert outcome["said"].startswith(said), outcome["said"]


def test_a_pause_without_requests_ends_nothing(world):
    for outcome in world("pauses", 2):
        assert outcome["on_the_way"] > 3
        assert outcome["others"] > 3


def test_a_batch_that_does_not_arrive_is_named(world):
    for outcome, has in zip(world("never_arrives", 2), ("all", "not all"), strict=True):
        assert "has waited 45 seconds for the weights of experts of layer" in outcome["said"]
        assert outcome["said"].endswith(f"this rank has {has} of its own")


def test_ranks_that_are_not_in_one_step_are_noticed(world):
    for outcome in world("apart", 2):
        assert "ranks are not in the same step" in outcome["said"]


def test_no_memory_for_the_buffers_on_one_rank_is_known_to_all(world):
    for outcome in world("no_memory", 2):
        assert outcome["said"].startswith("NoMemoryError: 1 of 2 ranks have no memory for the buffers")
