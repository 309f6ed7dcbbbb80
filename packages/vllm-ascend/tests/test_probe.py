# SPDX-License-Identifier: Apache-2.0
"""`vllm-ascend doctor --probe`: green on the simulated NPU, and a kernel that is wrong, refuses, ends its process or never answers shows in it."""

import json
import os
import subprocess
import sys
from inspect import isfunction
from types import SimpleNamespace

import pytest
import torch
from ascend_linear import kernels as linear
from ascend_moe import kernels as moe
from typer.testing import CliRunner
from vllm_ascend import cann, cli, doctor_report, envs, kernels
from vllm_ascend.attention import kernels as attention
from vllm_ascend.probe import child
from vllm_ascend.probe.expected import Result, compare
from vllm_ascend.probe.run import NEED_RANKS, run_all

NO_KERNELS = {
    "causal_mask", "side_stream", "wait_for", "kernel_head_size", "cached_head_size", "widened", "npu",
}  # fmt: skip


def numbered():
    """The cases, each with a name for pytest."""
    built = [build() for build in child.all_cases()]
    return [pytest.param(case, id=f"{case.kernel}-{number}") for number, case in enumerate(built)]


def test_every_kernel_has_a_case():
    wanted = {
        f"{package}.{name}"
        for package, module in (
            ("vllm_ascend", kernels),
            ("vllm_ascend", attention),
            ("ascend_linear", linear),
            ("ascend_moe", moe),
        )
        for name, member in vars(module).items()
        if isfunction(member)
        and member.__module__ == module.__name__
        and not name.startswith("_")
        and name not in NO_KERNELS
    }
    over_ranks = {kernel for kernel in NEED_RANKS if not kernel.startswith("ascend_comm.")}
    assert {parameter.values[0].kernel for parameter in numbered()} | over_ranks == wanted


@pytest.mark.parametrize("case", numbered())
def test_the_bound_of_a_case_catches_a_wrong_result(case):
    """What is expected is good; the same moved by one place is not."""
    expected = case.expected(*case.inputs)
    assert compare(case, [output.value for output in expected]).is_good
    moved = [output.value.roll(1, -1) for output in expected]
    assert compare(case, moved).verdict == "different"
    assert compare(case, [output.value[..., :-1] for output in expected]).verdict == "different"
    if expected[0].value.dtype.is_floating_point:
        spoilt = expected[0].value.clone()
        spoilt.flatten()[0] = torch.nan
        assert compare(case, [spoilt, *(output.value for output in expected[1:])]).verdict == "different"


def test_the_command_is_green_on_the_simulated_npu(tmp_path):
    report = tmp_path / "report.md"
    done = subprocess.run(
        [sys.executable, "-m", "vllm_ascend.cli", "doctor", "--probe", "--json", "--report", str(report)],
        capture_output=True, text=True, timeout=1800,
        env=os.environ | {"VLLM_API_KEY": "sesame", "HCCL_BUFFSIZE": "512", "ASCEND_SIM_STRICT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout[done.stdout.index("{") :])["kernels"]
    assert {result["verdict"] for result in results} == {"equal", "within bound"}
    assert set(NEED_RANKS) < {result["kernel"] for result in results}
    text = report.read_text()
    assert "| torch-npu | 2.13.0 |" in text
    assert "| HCCL_BUFFSIZE | 512 |" in text
    assert "sesame" not in text
    assert all(f"| {result['kernel']} | {result['shape']} | {result['verdict']} |" in text for result in results)


SPOILT = """
import os, signal
from vllm_ascend import kernels
from vllm_ascend.probe import cases_dense, child

swiglu, add = kernels.swiglu, kernels.add_rms_norm
kernels.swiglu = lambda x: swiglu(x) * 1.02
kernels.add_rms_norm = lambda x, residual, weight, epsilon: add(x, residual.float(), weight, epsilon)
kernels.split_columns = lambda x, widths: os.kill(os.getpid(), signal.SIGSEGV)
child.FAMILIES = (cases_dense,)
child.main()
"""
NO_CASES = (sys.executable, "-I", "-S", "-c", "print('{\"cases\": 0}')")


def test_a_wrong_kernel_and_one_that_refuses_and_one_that_ends_the_process():
    results = {result.kernel: result for result in run_all(600, (sys.executable, "-c", SPOILT), NO_CASES)}
    assert results["vllm_ascend.swiglu"].verdict == "different"
    assert "off, of" in results["vllm_ascend.swiglu"].detail
    assert results["vllm_ascend.add_rms_norm"].verdict == "refused"
    assert "npu_add_rms_norm" in results["vllm_ascend.add_rms_norm"].detail
    assert results["vllm_ascend.split_columns"].verdict == "no answer"
    assert "signal 11" in results["vllm_ascend.split_columns"].detail
    assert results["vllm_ascend.scatter_kv"].verdict == "equal"  # the last one
    assert not any(results[f"vllm_ascend.{name}"].is_good for name in ("swiglu", "add_rms_norm", "split_columns"))
    assert results["ascend_moe.mc2_combine"].verdict == "not run"
    assert results["ascend_moe.mc2_combine"].detail == "needs two devices"


SPOILT_RANK = """
import os, signal, sys
import torch
from ascend_comm import TorchGroup
from ascend_linear import kernels
from vllm_ascend.probe import cases_ranks, ranks

if len(sys.argv) > 2:  # rank 1

    def refuse(*given, **options):
        raise RuntimeError("error 561002")

    gather = TorchGroup.all_gather
    TorchGroup.all_gather = lambda self, x, dim=-1: gather(self, x, dim) * 1.02
    TorchGroup.broadcast = lambda self, x, src=0: os.kill(os.getpid(), signal.SIGSEGV)
    kernels.mm_reduce_scatter = refuse
wanted = (cases_ranks._all_gather, cases_ranks._mm_reduce_scatter, cases_ranks._broadcast, cases_ranks._all_to_all)
cases_ranks.cases = lambda: iter(wanted)
ranks.main()
"""


def test_a_rank_that_is_wrong_or_refuses_or_ends_while_the_other_one_waits_for_it():
    results = list(run_all(600, NO_CASES, (sys.executable, "-c", SPOILT_RANK)))
    assert [result.verdict for result in results] == ["different", "refused", "no answer", "equal"]
    details = [result.detail for result in results]
    assert details[0].startswith("rank 1: output 0: at most ")
    assert details[1] == "rank 1: error 561002"
    assert "rank 1 ended with signal 11" in details[2]


def test_two_ranks_that_cannot_begin():
    failing = (sys.executable, "-I", "-S", "-c", "import sys; sys.stderr.write('no link'); sys.exit(3)")
    (result,) = run_all(60, NO_CASES, failing)
    assert (result.kernel, result.verdict) == ("two ranks", "no answer")
    assert "the process ended with status 3: no link" in result.detail


SILENT = """
import json, sys, threading
print(json.dumps({"cases": 2}), flush=True)
for number in range(int(sys.argv[1]), 2):
    case = {"kernel": "k", "shape": str(number)}
    print(json.dumps({"begins": number, **case}), flush=True)
    if number == 0:
        threading.Event().wait()
    print(json.dumps({"ends": number, **case, "verdict": "equal"}), flush=True)
"""


def test_a_kernel_that_never_answers_is_given_up():
    results = list(run_all(10, (sys.executable, "-I", "-S", "-c", SILENT), NO_CASES))[:2]
    assert [result.verdict for result in results] == ["no answer", "equal"]
    assert results[0].detail == "silent for 10 seconds"


def test_a_process_that_cannot_begin():
    with pytest.raises(RuntimeError, match=r"cannot begin: the process ended with status 3: no device"):
        list(
            run_all(60, (sys.executable, "-I", "-S", "-c", "import sys; sys.stderr.write('no device\\n'); sys.exit(3)"))
        )


TABLE = """
| CANN Version | Supported PyTorch Version | Supported Extension Version | Github Branch |
|--------------|---------------------------|-----------------------------|---------------|
| CANN 8.5.0   | 2.12.0                    | 2.12.0rc1                   | v2.12.0       |
|              | 2.8.0                     | 2.8.0.post2                 | v2.8.0-7.3.0  |
| CANN 8.3.RC1 | 2.8.0                     | 2.8.0                       | v2.8.0-7.2.0  |
"""


@pytest.mark.parametrize(
    ("torch_version", "row"),
    [
        ("2.13.0", ("2.12.0", "8.5.0")),  # the table ends before it
        ("2.12.0+cpu", ("2.12.0", "8.5.0")),
        ("2.9.1", ("2.8.0", "8.3.RC1")),
        ("2.1.0", None),
    ],
)
def test_the_cann_that_a_wheel_needs(torch_version, row):
    assert cann.needed(TABLE, torch_version) == row


def test_the_installed_wheel_names_a_cann_and_an_older_one_is_told_of(monkeypatch):
    assert cann.older_than_needed("2.13.0") is None
    table = TABLE.replace("8.5.0", "99.1.0")
    monkeypatch.setattr(cann, "metadata", lambda name: SimpleNamespace(json={"description": table}))
    assert (
        "is older than 99.1.0, which torch-npu 2.13.0 names in its metadata for PyTorch 2.12.0"
        in cann.older_than_needed("2.13.0")
    )


def test_a_report_that_cannot_be_written(tmp_path):
    done = CliRunner().invoke(cli.app, ["doctor", "--report", str(tmp_path / "absent" / "report.md")])
    assert done.exit_code == 1
    assert "error: the report cannot be written to" in done.output
    assert "No such file or directory" in done.output


def test_a_report_is_written_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    path.write_text("old")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", fail)
        with pytest.raises(OSError, match="No space left"):
            doctor_report.write(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    assert path.read_text() == "old"
    doctor_report.write(path, "new")
    assert path.read_text() == "new"


def test_a_report_keeps_its_table_whatever_a_runtime_says():
    refused = Result(kernel="k", shape="", verdict="refused", detail="a | b\nc")
    assert doctor_report.summary([refused, refused]) == "2 refused"
    from vllm_ascend.doctor import Report

    assert "| k |  | refused | a \\| b c |" in doctor_report.text(Report(active=True), {}, [refused])


def test_variables_that_may_hold_a_secret_are_not_shown(monkeypatch):
    for name in ("VLLM_API_KEY", "VLLM_S3_SECRET", "HCCL_SOME_TOKEN", "MY_OWN"):
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("HCCL_BUFFSIZE", "300")
    shown = envs.for_report()
    assert shown["HCCL_BUFFSIZE"] == "300"
    assert shown["VLLM_API_KEY"] == "(set; its value is not shown)"
    assert "sesame" not in shown.values()
    assert "MY_OWN" not in shown
