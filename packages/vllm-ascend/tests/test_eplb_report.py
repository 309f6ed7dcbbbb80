# SPDX-License-Identifier: Apache-2.0
"""What is said about rebalances, and what is written."""

import logging
from dataclasses import asdict
from threading import Event

import pytest
from ascend_eplb import load_placement, spread
from vllm_ascend.eplb import report


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="vllm.vllm_ascend")
    return caplog


def test_a_rebalance_is_one_line(said):
    status = report.Status(planned_from=0.5, predicted=0.75)
    status.step_waited(0.002)
    status.step_waited(0.001)
    report.log_rebalance(status, moves=6, layers=2, num_bytes=3 << 20, seconds=1.5, steps=12)
    (record,) = said.records
    assert record.getMessage() == (
        "experts rebalanced: 6 slots in 2 layers, 3.0 MB over all ranks, in 1.50 s beside 12 steps; balancedness 0.500, predicted 0.750; steps have "
        "waited 3.0 ms so far, at most 2.00 ms"
    )


@pytest.mark.parametrize(
    ("reason", "level"),
    [("does not repay its bytes", "INFO"), ("failed: it ended", "WARNING")],
    ids=["dropped", "failed"],
)
def test_a_plan_that_moves_nothing_says_why(said, reason, level):
    report.log_dropped(reason, 0.5, 0.6)
    (record,) = said.records
    assert (record.levelname, record.getMessage()) == (
        level,
        f"no expert moves: {reason} (balancedness 0.500, planned 0.600)",
    )


def test_the_placement_is_written_as_a_map_file(tmp_path, said):
    placed = spread(num_experts=8, ranks=2, redundant=2, layers=2)
    report.write_map(placed, str(tmp_path / "map.json"))
    assert load_placement(tmp_path / "map.json", ranks=2, num_experts=8) == placed
    report.write_map(placed, str(tmp_path / "gone" / "map.json"))
    assert "cannot be written to" in said.text


def test_of_placements_that_wait_the_last_one_is_written(tmp_path, monkeypatch):
    placements = [spread(num_experts=8, ranks=2, redundant=redundant) for redundant in (0, 2, 4)]
    goes_on, written, began = Event(), [], Event()

    def slow(placed, path):
        began.set()
        goes_on.wait(60)
        written.append(placed)

    monkeypatch.setattr(report, "write_map", slow)
    writer = report.MapWriter(str(tmp_path / "map.json"))
    writer.put(placements[0])
    assert began.wait(60)
    for placed in placements[1:]:
        writer.put(placed)
    goes_on.set()
    writer.close()
    assert written == [placements[0], placements[2]]


def test_a_file_that_takes_too_long_is_not_waited_for(tmp_path, monkeypatch, said):
    goes_on = Event()
    monkeypatch.setattr(report, "write_map", lambda placed, path: goes_on.wait(60))
    monkeypatch.setattr(report, "_SECONDS_TO_WRITE", 0.01)
    writer = report.MapWriter(str(tmp_path / "map.json"))
    writer.put(spread(num_experts=8, ranks=2))
    writer.close()
    assert "map.json' within 0.01 seconds" in said.text
    goes_on.set()


def test_dropped_plans_are_counted_by_reason():
    status = report.Status()
    for reason in ("no load", "failed: it ended", "no load", "failed: it hangs"):
        status.count_dropped(reason)
    assert status.dropped == {"no load": 2, "failed": 2}
    assert status.failures == 2
    assert asdict(status)["dropped"] == status.dropped  # as tests and programs get it from a worker
