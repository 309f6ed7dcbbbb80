# SPDX-License-Identifier: Apache-2.0
"""The command line in processes of its own, and the README's example."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ascend_comm import Topology

PACKAGE = Path(__file__).parents[1]
EXAMPLE = ["show", "--world", "16", "--dp", "2", "--pp", "2", "--tp", "4", "--flashcomm2", "2"]


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{before}\nfrom ascend_comm.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env={"COLUMNS": "120"})


def test_show_draws_the_groups():
    done = run(*EXAMPLE)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.split("[│┃]", line) for line in done.stdout.splitlines()]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines if len(cells) > 4}
    assert rows["tp"] == ["4", "200 MB", "0-3  4-7  8-11  12-15"]
    assert rows["mc2"] == ["8", "200 MB", "0,1,2,3,8,9,10,11  4,5,6,7,12,13,14,15"]
    assert rows["flashcomm2_otp"] == ["2", "200 MB", "0,2  1,3  4,6  5,7  8,10  9,11  12,14  13,15"]
    assert rows["pcp"] == ["1", "-", "each rank alone"]
    # tp, pp, mc2, otp, odp of 200 MB and dp of 50 MB, two buffers each.
    assert "2100 MB a rank" in done.stdout


def test_show_as_json_holds_every_option():
    done = run(*EXAMPLE, "--lmhead-tp", "2", "--layer-sharding", "o_proj", "--hccl-buffsize", "100", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    topology = Topology(16, 2, 2, 1, 4)
    assert shown["sizes"] == {"xdp": 1, "dp": 2, "pp": 2, "pcp": 1, "tp": 4}
    assert shown["groups"]["flashcomm2_odp"] == topology.flashcomm2(2)[1]
    assert shown["groups"]["lmhead_tp"] == topology.fine_grained(2)
    assert shown["groups"]["shard_weight"] == topology.shard_weight(2)
    assert {"names": ["dp"], "ranks": [0, 8], "buffer_mb": 50} in shown["communicators"]
    assert shown["hccl_bytes_per_rank"] == [2 * (200 * 6 + 100 + 50) * 2**20] * 16
    done = run(*["show", "--world", "8", "--tp", "8", "--pd-tp-ratio", "4", "--pd-head-replicas", "2", "--json"])
    assert json.loads(done.stdout)["groups"]["p_tp"] == [[0, 2], [4, 6], [1, 3], [5, 7]]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--world 16 --dp 3", "ascend-comm: world_size=16: must be a multiple of 3"),
        ("--world 0", "ascend-comm: world_size=0: must be at least 1"),
        ("--world 10000000", "ascend-comm: world_size=10000000: must be at most 65536"),
        ("--world 8 --tp 8 --flashcomm2 3", "ascend-comm: flashcomm2=3: must divide tensor_parallel=8"),
        ("--world 8 --tp 2 --otp 2", "ascend-comm: otp=2: cannot be used with tensor_parallel=2"),
    ],
)
def test_invalid_sizes_give_one_line(arguments, reason):
    done = run("show", *arguments.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(reason)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_standard_output_that_is_closed_or_full(option):
    code = "import sys; from ascend_comm.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *EXAMPLE, *option]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=1800)
    assert (done.returncode, done.stderr) == (
        1,
        "ascend-comm: standard output cannot be written: No space left on device\n",
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=1800)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]  # from the start
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False, timeout=1800)
    assert (done.returncode, done.stderr) == (0, "")


def test_wrong_usage():
    assert run("show").returncode == 2
    assert run("show", "--world", "many").returncode == 2
    assert run("--help").returncode == 0


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing):
    done = run(*EXAMPLE, before=f"sys.modules[{missing!r}] = None")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ascend-comm: {missing} is not installed; pip install 'ascend-comm[cli]'\n"


def test_the_readme_example_runs(tmp_path):
    text = (PACKAGE / "README.md").read_text()
    script = tmp_path / "example.py"
    script.write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0]
    assert sorted(done.stdout.splitlines()) == sorted(expected.splitlines())
