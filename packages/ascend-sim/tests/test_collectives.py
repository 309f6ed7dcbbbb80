# SPDX-License-Identifier: Apache-2.0
"""Orders of collectives that can and cannot work, written by hand; and the log of real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ascend_sim.collectives import Call, disagreements, read_logs


def calls(rank, *spec, size=2):
    """Calls such as "tp:allreduce_:4"."""
    made = []
    for one in spec:
        group, op, numbers = one.split(":")
        made.append(Call(op=op, group=group, rank=rank, size=size, device="npu", dtype="Float", numbers=int(numbers)))
    return made


def test_equal_orders_agree():
    order = ("tp:allreduce_:4", "dp:_allgather_base_:8", "tp:allreduce_:4", "dp:allreduce_:2")
    assert disagreements({"a": calls(0, *order), "b": calls(1, *order)}) == []
    assert disagreements({}) == []


def test_a_swapped_pair_on_one_group():
    logs = {
        "a": calls(0, "dp:allreduce_:4", "dp:_allgather_base_:4"),
        "b": calls(1, "dp:_allgather_base_:4", "dp:allreduce_:4"),
    }
    (found,) = disagreements(logs)
    assert found == (
        "call 0 on group dp differs: a: allreduce_ of 4 Float over group dp; b: _allgather_base_ of 4 Float over group dp"
    )


def test_a_swapped_pair_on_two_groups():
    """Each group agrees within itself. This is how the LM head and the recorder of loads once waited for each other."""
    logs = {
        "busy": calls(0, "lmhead:allreduce_:4", "ep:allreduce_:8"),
        "idle": calls(1, "ep:allreduce_:8", "lmhead:allreduce_:4"),
    }
    (found,) = disagreements(logs)
    assert found.startswith("these wait for each other, each for the next: call 0, allreduce_ of ")
    assert "over group lmhead" in found
    assert "over group ep" in found


def test_a_circle_through_three_processes():
    """No two processes have two groups in common, and still none can begin."""
    logs = {
        "a": calls(0, "x:allreduce_:1", "y:allreduce_:1"),
        "b": calls(0, "y:allreduce_:1", "z:allreduce_:1"),
        "c": calls(1, "z:allreduce_:1", "x:allreduce_:1"),
    }
    (found,) = disagreements(logs)
    assert all(f"over group {group}" in found for group in "xyz")
    logs["c"].reverse()
    assert disagreements(logs) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("dp:allreduce_:4",), "call 1 on group dp differs: a: allreduce_ of 4 Float over group dp; b: nothing more"),
        (("dp:allreduce_:4", "dp:allreduce_:5"), "call 1 on group dp differs"),
        ((), "of the 2 ranks of group dp only 1 joined it: allreduce_ of 4 Float over group dp in a"),
    ],
)
def test_a_call_that_is_missing_or_of_another_size(other, said):
    (found,) = disagreements({"a": calls(0, "dp:allreduce_:4", "dp:allreduce_:4"), "b": calls(1, *other)})
    assert found.startswith(said)


def test_messages_are_between_two_ranks():
    sends = Call(op="send", group="pp", rank=0, size=3, peer=1, numbers=4)
    receives = Call(op="recv_", group="pp", rank=1, size=3, peer=0, numbers=4)
    assert disagreements({"a": [sends], "b": [receives]}) == []


def test_a_line_that_was_cut_off_and_a_file_of_another_kind(tmp_path):
    whole = '{"op": "allreduce_", "group": "0", "about": "", "rank": 0, "size": 1}\n'
    (tmp_path / "7.jsonl").write_text(whole + '{"op": "allre')
    assert read_logs(tmp_path) == {"7": [Call(op="allreduce_", group="0", rank=0, size=1)]}
    (tmp_path / "8.jsonl").write_text('{"kind": 1}\n')
    with pytest.raises(ValueError, match=r"8.jsonl is no log of collectives"):
        read_logs(tmp_path)


def test_what_processes_log(tmp_path):
    """Collectives over HCCL and over Gloo, in the order of the calls, with what ranks must have in common."""
    worker = Path(__file__).with_name("collectives_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path / "store")],
            env=os.environ | {"ASCEND_SIM_COLLECTIVES": str(tmp_path)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    logs = read_logs(tmp_path)
    assert set(logs) == {str(process.pid) for process in processes}
    assert disagreements(logs) == []
    found = [(call.op, call.about, call.device, call.numbers) for call in logs[str(processes[0].pid)]]
    assert found[: len(EXPECTED)] == EXPECTED
    for log in logs.values():
        log[0], log[1] = log[1], log[0]
        assert disagreements(logs) == [] or log is logs[str(processes[0].pid)]


EXPECTED = [
    ("allreduce_", "default_pg", "npu", 4),
    ("allreduce_", "on hosts", "cpu", 3),
    ("_allgather_base_", "default_pg", "npu", 8),
    ("alltoall_base_", "default_pg", "npu", 8),
    ("alltoall_base_", "default_pg", "npu", None),
    ("alltoall_", "default_pg", "npu", None),
    ("npu_mm_all_reduce_base", "default_pg", "", None),
    ("send", "default_pg", "npu", 4),
]
