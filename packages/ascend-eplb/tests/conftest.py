# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from ascend_eplb.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder but for load.npy, three steps of two layers of 256 experts; it is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    np.save("load.npy", np.random.default_rng(0).lognormal(0, 1, (3, 2, 256)))
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """Run a command line in that folder: its status, output and errors."""

    def run(line):
        status = main(line.split())
        done = capsys.readouterr()
        return status, done.out, done.err

    return run


@pytest.fixture
def run_json(run):
    """Run a command line that must succeed with --json: what it prints."""

    def run_json(line):
        status, out, err = run(line + " --json")
        assert status == 0, err
        return json.loads(out)

    return run_json
