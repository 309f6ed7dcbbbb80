# SPDX-License-Identifier: Apache-2.0
"""The command: facts, exit statuses, and one line for every mistake."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from ascend_sim import checkpoints, cli, loader
from typer.testing import CliRunner


def command(*arguments, **environment):
    variables = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run(
        [sys.executable, "-m", "ascend_sim.cli", *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_status_of_an_active_simulator():
    done = invoke("status", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["active"] is True
    assert facts["compiled"] is True
    assert facts["devices"] == 8
    assert facts["memory_bytes"] == 4 << 30
    assert facts["versions"]["CANN (simulated)"] == "8.5.0"
    assert facts["versions"]["torch-npu"].startswith("2.13.0")
    table = invoke("status").stdout
    for text in ("active because there is no CANN", "8 (ASCEND_SIM_DEVICES)", "4 GiB each", "g++"):
        assert text in table


def test_status_of_an_inactive_one_is_1_and_imports_no_torch():
    code = (
        "import sys\nfrom ascend_sim import cli\nsys.argv = ['ascend-sim', 'status', '--json']\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 1\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ASCEND_SIM": "0"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=True,
    )
    facts = json.loads(done.stdout)
    assert (facts["active"], facts["reason"]) == (False, "ASCEND_SIM=0 switches it off")


def test_status_without_torch(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(loader.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "version", version)
    done = invoke("status")
    assert done.exit_code == 1
    assert "inactive because torch-npu is not installed" in done.stdout


def test_kernels_that_are_covered_and_that_are_not():
    done = invoke("kernels", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert not set(facts["covered"]) & set(facts["missing"])
    assert len(facts["covered"]) + len(facts["missing"]) > 400
    assert "npu::npu_ciou" in facts["missing"]
    assert facts["aten_operators"] > 1000
    filtered = invoke("kernels", "--filter", "npu_ciou").stdout
    assert "npu::npu_ciou" in filtered
    assert "npu_rms_norm" not in filtered
    assert "0 of" in filtered


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    for arguments, environment, message in (
        (
            ["kernels"],
            {"ASCEND_SIM": "maybe"},
            "ascend-sim: the simulator is inactive because ASCEND_SIM is 'maybe'; allowed: 0 (off), 1 (on), unset (on where there is no CANN)",
        ),
        (
            ["kernels"],
            {"ASCEND_SIM": "0"},
            "ascend-sim: the simulator is inactive because ASCEND_SIM=0 switches it off",
        ),
        (
            ["model", "upcycle", str(tmp_path / "new"), "--experts", "2", "--top-k", "3", "--source", "/nowhere"],
            {},
            "ascend-sim: top_k=3: ",
        ),
        (
            ["model", "upcycle", str(tmp_path / "new"), "--experts", "4", "--top-k", "2", "--source", "/nowhere"],
            {},
            "ascend-sim: /nowhere/config.json is missing",
        ),
        (["model", "smollm2", str(tmp_path / "full")], {}, "ascend-sim: "),
        (["model", "minilm", str(tmp_path / "full")], {}, "ascend-sim: "),
    ):
        done = command(*arguments, **environment)
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 1, done.stderr
        assert errors[-1].startswith(message), done.stderr
        assert "Traceback" not in done.stderr
        assert len(errors) == 1, done.stderr
        assert not done.stdout
    assert not (tmp_path / "new").exists()


def test_a_kernel_library_that_does_not_compile_is_one_line(tmp_path):
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    script.chmod(0o755)
    done = command("kernels", CXX=str(script), ASCEND_SIM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stderr.startswith("ascend-sim: there is no simulated NPU in this process: the compiler failed")
    assert "Traceback" not in done.stderr


BROKEN = {
    "switch": ({"ASCEND_SIM": "maybe"}, "ASCEND_SIM is 'maybe'; allowed: 0 (off), 1 (on)"),
    "devices": ({"ASCEND_SIM_DEVICES": "0"}, "ASCEND_SIM_DEVICES is '0'; allowed: 1 to 64"),
    "memory": ({"ASCEND_SIM_MEMORY": "9" * 400}, "allowed: at most 65536GiB"),
    "chip": ({"ASCEND_SIM_SOC": "x"}, "ASCEND_SIM_SOC is 'x'; allowed: "),
    "mode": ({"ASCEND_SIM_STRICT": "x"}, "ASCEND_SIM_STRICT is 'x'; allowed: "),
    "compiler": ({"PATH": "/nowhere", "CXX": "", "ASCEND_SIM_CACHE": "{folder}/empty"}, "found no C++ compiler: apt install g++"),
    "cache": ({"ASCEND_SIM_CACHE": "{folder}/file/cache"}, "cannot be used (Not a directory); set ASCEND_SIM_CACHE"),
    "owner": ({"ASCEND_SIM_CACHE": "{folder}/open"}, "which others may write"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_status_says_what_keeps_the_simulator_from_running(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    variables, message = BROKEN[name]
    done = command(
        "status", "--json", **{key: value.replace("{folder}", str(tmp_path)) for key, value in variables.items()}
    )
    assert (done.returncode, done.stderr) == (1, "")
    facts = json.loads(done.stdout)
    assert facts["active"] is False
    assert message in facts["problem"]


def test_standard_output_that_is_closed_or_full():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ascend_sim.cli", "status"], env={**os.environ, "ASCEND_SIM": "0"}, stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=1800, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_checkpoint_is_made_with_progress(tmp_path, monkeypatch):
    made = []

    def smollm2(directory, *, progress=None):
        made.append(("smollm2", directory))
        progress("dequantise", 1, 2)
        progress("dequantise", 2, 2)
        return directory

    def upcycle(source, directory, *, experts, top_k, seed=0, progress=None):
        made.append(("upcycle", source, directory, experts, top_k, seed))
        progress("upcycle", 3, 3)
        return directory

    monkeypatch.setattr(checkpoints, "smollm2", smollm2)
    monkeypatch.setattr(checkpoints, "upcycle", upcycle)
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path))
    done = invoke("model", "smollm2", "/new")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "/new"
    assert "dequantise" in done.stderr
    assert "100 %" in done.stderr
    for prefix in (["model"], []):
        done = invoke(*prefix, "upcycle", "/moe", "--experts", 4, "--top-k", 2)
        assert done.exit_code == 0, done.output
    invoke("upcycle", "/moe", "--experts", 4, "--top-k", 2, "--source", "/dense", "--seed", 7)
    dense = tmp_path / "SmolLM2-135M-Instruct"
    assert [str(part) for part in made[2]] == ["upcycle", str(dense), "/moe", "4", "2", "0"]
    assert [str(part) for part in made[-1]] == ["upcycle", "/dense", "/moe", "4", "2", "7"]


@pytest.mark.parametrize("arguments", [["--help"], ["model", "--help"], ["model", "upcycle", "--help"]])
def test_help(arguments):
    done = invoke(*arguments)
    assert done.exit_code == 0
    assert "Usage" in done.stdout
