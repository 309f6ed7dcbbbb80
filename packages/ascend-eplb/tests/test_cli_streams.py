# SPDX-License-Identifier: Apache-2.0
"""Standard output and error that are closed or full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ascend_eplb as eplb
from ascend_eplb.cli import main

EVERY_COMMAND = (
    "--help", "--version", "generate --experts 8 --ranks 2 -o x.json", "check map.json", "check map.json --json", "show map.json",
    "show map.json --rank 1", "show map.json --json", "convert map.json x.npz", "plan --load load.npy --ranks 32 --slots 288 -o x.json",
    "simulate --load load.npy --ranks 32 --slots 288", "check none.json --json",
)  # fmt: skip


def failing_output(monkeypatch, descriptor):
    """Standard output on this descriptor, as a process has it when it starts."""
    stream = os.fdopen(descriptor, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("line", EVERY_COMMAND)
def test_a_full_standard_output_is_one_line_and_status_1(folder, capsys, monkeypatch, line):
    eplb.save_placement(eplb.spread(num_experts=8, ranks=2), folder / "map.json")
    with failing_output(
        monkeypatch, os.open("/dev/full", os.O_WRONLY)
    ):  # closing it writes what is left: no error any more
        assert main(line.split()) == 1
    said = "error: none.json: No such file or directory\n" if "none.json" in line else ""
    assert capsys.readouterr().err == said + "error: standard output: No space left on device\n"


@pytest.mark.parametrize("line", EVERY_COMMAND)
def test_a_closed_pipe_is_no_error(folder, capsys, monkeypatch, line):
    eplb.save_placement(eplb.spread(num_experts=8, ranks=2), folder / "map.json")
    reading, writing = os.pipe()
    os.close(reading)
    with failing_output(monkeypatch, writing):
        assert main(line.split()) == 1
    assert capsys.readouterr().err == ("error: none.json: No such file or directory\n" if "none.json" in line else "")


def run_apart(line, **streams):
    """Run a command line in a process of its own."""
    return subprocess.run([sys.executable, "-m", "ascend_eplb", *line.split()], text=True, check=False, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.usefixtures("folder")
def test_streams_that_fail_at_the_end_of_a_process():
    with open("/dev/full", "w") as full:
        done = run_apart("generate --experts 8 --ranks 2 -o map.json", stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")
        assert run_apart("check none.json", stdout=subprocess.PIPE, stderr=full).returncode == 1
    done = run_apart("check map.json --json", stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")
