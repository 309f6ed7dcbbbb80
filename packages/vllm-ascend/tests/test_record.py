# SPDX-License-Identifier: Apache-2.0
"""Recorded loads: what stands in the file and when, without an engine."""

import logging
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from ascend_comm import Solo
from ascend_eplb import read_loads, spread
from vllm import envs
from vllm_ascend.config import EplbConfig
from vllm_ascend.eplb import record
from vllm_ascend.eplb.record import LoadRecorder
from vllm_ascend.eplb.writer import LoadWriter

FORMATS = ["load.jsonl", "load.json", "load.npy", "load.npz"]


def recorder_of(path, interval=2):
    counts = [torch.zeros(4, dtype=torch.int64, device="npu") for _ in range(2)]
    config = EplbConfig(expert_load_record_path=str(path), expert_heat_collection_interval=interval)
    return counts, LoadRecorder(config, [spread(num_experts=4, ranks=1)] * 2, counts, Solo(), writes=True)


def step(counts, recorder, number):
    """Tokens for every expert that tell steps and layers apart."""
    for layer, count in enumerate(counts):
        count += torch.tensor([1, 0, number, layer], device="npu")
    recorder.step()


@pytest.mark.parametrize("name", FORMATS)
def test_intervals_and_the_steps_after_the_last_one(tmp_path, monkeypatch, name):
    monkeypatch.setattr(record, "_SECONDS_TO_WRITE", 60)  # on a machine as busy as it may be
    counts, recorder = recorder_of(tmp_path / name)
    for number in range(5):
        step(counts, recorder, number)
    recorder.close()
    recorder.close()
    expected = [[[2, 0, 1, 0], [2, 0, 1, 2]], [[2, 0, 5, 0], [2, 0, 5, 2]], [[1, 0, 4, 0], [1, 0, 4, 1]]]
    assert np.array_equal(read_loads(tmp_path / name), expected)


def test_without_steps_there_is_no_file(tmp_path):
    _, recorder = recorder_of(tmp_path / "load.jsonl")
    recorder.close()
    assert not (tmp_path / "load.jsonl").exists()


def test_a_step_does_not_wait_for_the_file(tmp_path):
    """The writer is held up in its first entry; steps go on, up to a bound, and nothing that was accepted is lost."""
    writer, goes_on = LoadWriter(str(tmp_path / "load.jsonl")), threading.Event()

    def held(number):
        assert goes_on.wait(60)
        return np.full((1, 2), number)

    for number in range(10):
        writer.put(lambda number=number: held(number))
    assert not (tmp_path / "load.jsonl").exists()
    goes_on.set()
    writer.close()
    assert read_loads(tmp_path / "load.jsonl")[:, 0, 0].tolist() == list(range(10))


def test_too_many_waiting_entries_are_left_out_with_a_word(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vllm_ascend.eplb.writer._MOST_WAITING", 16)
    writer, begun, goes_on = LoadWriter(str(tmp_path / "load.jsonl")), threading.Event(), threading.Event()
    writer.put(lambda: (begun.set(), goes_on.wait(60), np.full((1, 2), 99))[2])
    assert begun.wait(60)
    for number in range(40):
        writer.put(lambda number=number: np.full((1, 2), number))
    goes_on.set()
    writer.close()
    assert read_loads(tmp_path / "load.jsonl")[:, 0, 0].tolist() == [99, *range(16)]
    assert caplog.text.count("is written too slowly: an entry of the experts' loads is left out") == 24


@pytest.mark.parametrize("full", [False, True])
def test_a_writer_that_makes_no_progress_is_waited_for_no_longer_than_a_worker_lives(
    tmp_path, caplog, monkeypatch, full
):
    monkeypatch.setattr("vllm_ascend.eplb.writer._MOST_WAITING", 1)
    monkeypatch.setattr(record, "_SECONDS_TO_WRITE", 0.01)
    _, recorder = recorder_of(tmp_path / "load.npz")
    writer, begun, goes_on = recorder._writer, threading.Event(), threading.Event()
    writer.put(lambda: (begun.set(), goes_on.wait(60), np.ones((2, 4)))[2])
    assert begun.wait(60)
    if full:
        writer.put(lambda: np.ones((2, 4)))
    waited, put, join = [], writer._waiting.put, writer._thread.join
    monkeypatch.setattr(
        writer._waiting, "put", lambda item, timeout: (waited.append(timeout), put(item, True, timeout))
    )
    monkeypatch.setattr(writer._thread, "join", lambda timeout: (waited.append(timeout), join(timeout)))
    recorder.close()
    assert "load.npz' within 0.01 seconds; a .jsonl file is appended to, which takes less time" in caplog.text
    assert waited[0] == 0.01
    assert waited[1] == 0 if full else 0 <= waited[1] <= 0.01
    goes_on.set()
    join(60)


def test_a_recorder_closes_before_vllm_ends_the_worker():
    assert (
        record._LAST_MEETING.total_seconds() + record._SECONDS_TO_WRITE < envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS - 1
    )


def test_a_full_disk_writes_no_step_twice(tmp_path, caplog):
    """A limit on the size of files stands for the full disk: of two steps that are appended together it cuts the second."""
    path, said, begun, goes_on = tmp_path / "load.jsonl", Said(), threading.Event(), threading.Event()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = LoadWriter(str(path))
    logging.getLogger("vllm.vllm_ascend").addHandler(said)

    def held():
        begun.set()
        assert goes_on.wait(60)
        return np.full((1, 2), 1)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size * 7 // 4, limits[1]))  # the file has two steps
        return np.full((1, 2), 2)

    try:
        for entry in (lambda: np.full((1, 2), 0), held):
            writer.put(entry)
        assert begun.wait(60)
        for entry in (limited, lambda: np.full((1, 2), 3)):
            writer.put(entry)
        goes_on.set()
        assert said.event.wait(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        logging.getLogger("vllm.vllm_ascend").removeHandler(said)
    writer.put(lambda: np.full((1, 2), 4))
    writer.close()
    assert "File too large" in caplog.text
    assert read_loads(path)[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


class Said(logging.Handler):
    """Sets an event when something is logged."""

    def __init__(self):
        super().__init__()
        self.event = threading.Event()

    def emit(self, record):
        self.event.set()


@pytest.mark.parametrize("name", FORMATS)
def test_what_cannot_be_written_comes_with_the_next_entry(tmp_path, caplog, name):
    folder, said = tmp_path / "gone", Said()
    logging.getLogger("vllm.vllm_ascend").addHandler(said)
    writer = LoadWriter(str(folder / name))
    writer.put(lambda: np.ones((1, 2)))
    assert said.event.wait(60)
    logging.getLogger("vllm.vllm_ascend").removeHandler(said)
    folder.mkdir()
    writer.put(lambda: np.zeros((1, 2)))
    writer.close()
    assert "cannot be written to" in caplog.text
    assert name in caplog.text
    assert np.array_equal(read_loads(folder / name), [[[1, 1]], [[0, 0]]])


@pytest.mark.parametrize("name", ["load.jsonl", "load.npy"])
def test_the_file_is_bounded(tmp_path, monkeypatch, name):
    """Each entry is asked for after the one before has been written."""
    monkeypatch.setattr("vllm_ascend.eplb.writer._MOST_ENTRIES", 4)
    path = tmp_path / name
    path.write_bytes(b"of an earlier run")
    writer, lengths = LoadWriter(str(path)), []

    def entry(number, asked):
        lengths.append(len(read_loads(path)) if number else 0)
        asked.set()
        return np.full((1, 2), number)

    for number in range(30):
        asked = threading.Event()
        writer.put(lambda number=number, asked=asked: entry(number, asked))
        assert asked.wait(60)
    writer.close()
    assert max(lengths) <= 8
    assert read_loads(path)[-4:, 0, 0].tolist() == [26, 27, 28, 29]


def test_a_failure_of_the_writer_is_said_once_and_ends_no_step(tmp_path, caplog):
    writer = LoadWriter(str(tmp_path / "load.jsonl"))
    writer.put(lambda: np.full((1, 2), -1))  # no load is negative
    writer.close()
    with caplog.at_level(logging.ERROR):
        writer.put(lambda: np.ones((1, 2)))
    writer.close()
    assert caplog.text.count("the experts' loads are no longer written to") == 1
    assert "is -1" in caplog.text


def test_an_interpreter_that_ends_writes_first(tmp_path):
    program = f"""
import numpy as np
from vllm_ascend.eplb.writer import LoadWriter
writer = LoadWriter({str(tmp_path / "load.npz")!r})
for number in range(3):
    writer.put(lambda number=number: np.full((1, 2), number))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert read_loads(tmp_path / "load.npz")[:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("ends_early", [False, True])
def test_ranks_meet_at_the_end_and_wait_for_no_lost_one(tmp_path, ends_early):
    worker = Path(__file__).with_name("record_worker.py")
    ranks = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(tmp_path), *(["early"] if ends_early else [])])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    if ends_early:
        assert not (tmp_path / "load.jsonl").exists()
    else:
        assert np.array_equal(
            read_loads(tmp_path / "load.jsonl"), [[[1, 0, 0, 0, 1, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1, 1]]]
        )


def test_layers_with_other_numbers_of_experts_cannot_be_recorded():
    placed = [spread(num_experts=4, ranks=1), spread(num_experts=8, ranks=1)]
    with pytest.raises(
        ValueError,
        match=r"expert_load_record_path' \('load.npy'\) needs MoE layers with equal numbers of experts, got \[4, 8\]",
    ):
        LoadRecorder(EplbConfig(expert_load_record_path="load.npy"), placed, [], Solo(), writes=True)
