# SPDX-License-Identifier: Apache-2.0
"""The planner beside the steps: what it answers, and what becomes of a planner that dies, hangs, raises or says something wrong."""

import sys
import threading

import numpy as np
import pytest
from ascend_eplb import spread
from vllm_ascend.eplb.client import Planner, Question
from vllm_ascend.eplb.decide import RebalanceDecision, Rules, decide

RULES = Rules(
    policy="balanced", weighting="decayed", max_moves=100, buffer_experts=2, expert_bytes=100, horizon_steps=10
)
PLACED = spread(num_experts=8, ranks=2, redundant=2, layers=2)
LOADS = np.random.default_rng(0).lognormal(0, 1, (3, 2, 8)) * 100
QUESTION = Question(placed=PLACED, rules=RULES, step_seconds=1.0, seconds_per_byte=0.0)

HEAD = "import sys, time\nfrom vllm_ascend.eplb import planner\n"
ANSWER = "def reply(body): {}\nplanner.serve(sys.stdin.buffer, sys.stdout.buffer, reply)"
NUMBERS = (
    '{\\"reason\\": \\"\\", \\"before\\": 0.5, \\"after\\": 0.6, \\"saved_seconds\\": 1.0, \\"cost_seconds\\": 0.0}'
)
FAULTS = {
    "ends at once": ("", "failed: the planner's process has ended"),
    "dies when it is asked": (HEAD + "sys.stdin.buffer.read(8); sys.exit(3)", "failed: the planner's process has ended"),
    "hangs": ("import time; time.sleep(600)", "failed: the planner's process has taken more than 2 seconds"),
    "raises": (
        HEAD + ANSWER.format("return planner.answer(body[:40])"),
        "failed: BadZipFile",
    ),
    "prints": ("print('x' * 100); import time; time.sleep(600)", "failed: the planner's process announces a reply of"),
    "plans wrongly": (
        HEAD + "import numpy as np\n"
        + ANSWER.format(
            "return planner.pack({'transfers': np.array([[0, 0, 7, 0, 0, 1, 0]], np.int32), 'text': np.array(\"" + NUMBERS + '")})'
        ),
        "failed: the planner's plan is wrong: batch 0: slot 0 of rank 0 in layer 0 holds expert 0, not 7",
    ),
}  # fmt: skip


def replies(planner, count=1):
    """The next decisions, which come without anybody waiting in a step."""
    found = []
    while len(found) < count:
        if (decision := planner.reply()) is not None:
            found.append(decision)
    return found


@pytest.fixture
def started():
    planners = []

    def start(seconds=120.0, **options):
        planners.append(Planner(window=2, seconds=seconds, **options))
        return planners[-1]

    yield start
    for planner in planners:
        planner.close()
        planner.close()
        assert not planner._thread.is_alive()


def test_it_plans_from_the_window_and_asks_one_process(started):
    planner = started()
    planner.put(lambda: LOADS[0], None)
    planner.put(lambda: LOADS[1], QUESTION)
    planner.put(lambda: LOADS[2], QUESTION)
    first, second = replies(planner, 2)
    for decision, history in ((first, LOADS[:2]), (second, LOADS[1:])):
        expected = decide(PLACED, history, RULES, step_seconds=1.0, seconds_per_byte=0.0)
        assert np.array_equal(decision.transfers, expected.transfers)
        assert (decision.before, decision.after, decision.reason) == (expected.before, expected.after, expected.reason)
    assert planner.failures == 0
    assert planner.reply() is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planner_that_fails_moves_nothing_and_says_why(started, fault, caplog):
    program, reason = FAULTS[fault]
    planner = started(seconds=2.0 if fault == "hangs" else 120.0, command=[sys.executable, "-c", program])
    planner.put(lambda: LOADS[0], QUESTION)
    (decision,) = replies(planner)
    assert decision.reason.startswith(reason)
    assert len(decision.transfers) == 0
    assert planner.failures == 1
    assert "no plan for the experts of this interval" in caplog.text


def test_a_planner_that_was_killed_is_started_again(started):
    planner = started()
    planner.put(lambda: LOADS[0], QUESTION)
    replies(planner)
    planner._process.kill()
    planner._process.wait()
    planner.put(lambda: LOADS[1], QUESTION)
    (decision,) = replies(planner)
    assert decision.reason == ""


def test_a_load_that_does_not_come_is_a_failure(started):
    def fails():
        raise RuntimeError("a rank has ended")

    planner = started()
    planner.put(fails, QUESTION)
    assert replies(planner)[0].reason == "failed: a rank has ended"


def test_a_thread_that_has_ended_is_a_failure(started):
    planner = started()
    planner.close()
    assert planner.reply().reason == "failed: the planner's thread has ended"


def test_it_closes_while_the_process_is_asked(started, caplog):
    """Nobody waits for a plan at the end, and nothing is logged about it."""
    begun = threading.Event()
    planner = started(command=[sys.executable, "-c", "import time; time.sleep(600)"])
    planner.put(lambda: (begun.set(), LOADS[0])[1], QUESTION)
    assert begun.wait(60)
    planner.close()
    assert not planner._thread.is_alive()
    assert "no plan" not in caplog.text


def test_nothing_moves_by_default():
    assert RebalanceDecision().transfers.shape == (0, 7)
