# SPDX-License-Identifier: Apache-2.0
"""A worker's profiler without an engine: torch_npu's own writes what the host did. The simulated NPU has nothing to measure on the device."""

import csv
import os
import subprocess
import sys

# The profiler starts and ends with its process: it takes hold of torch's own, and parses in children of it.
WORKER = """
import sys, torch
from vllm.config.profiler import ProfilerConfig
from vllm.profiler.wrapper import validate_worker_profiler_config
from vllm_ascend import compat
from vllm_ascend.profiler import NpuProfiler

compat.accept_profiler()
cases = {
    "both": {}, "host": {"torch_profiler_activities": ["CPU"]},
    "scheduled": {"wait_iterations": 1, "warmup_iterations": 1, "active_iterations": 2},
}
for name, options in cases.items():
    config = ProfilerConfig(profiler="torch", torch_profiler_dir=sys.argv[1], torch_profiler_with_stack=False, **options)
    validate_worker_profiler_config(config)
    profiler = NpuProfiler(config, "unnamed")
    profiler.set_output_name(name)
    profiler.start()
    for size in range(3, 9):
        with profiler.annotate_context_manager("step of " + name):
            torch.ones(size, 2, device="npu") @ torch.ones(2, size, device="npu")
        profiler.step()
    profiler.stop()
    assert not profiler.is_running
"""


def operators(trace):
    with open(trace / "ASCEND_PROFILER_OUTPUT" / "operator_details.csv") as file:
        return [row["Name"] for row in csv.DictReader(file)]


def test_traces(tmp_path):
    """Of six steps all are recorded; or one waits, one warms up, and two are recorded."""
    environment = os.environ | {"ASCEND_SIM_STRICT": "0"}
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Failed to st" not in done.stderr  # to start, to stop: vLLM says no more of it than that
    traces = {trace.name.split("_")[0]: trace for trace in tmp_path.iterdir()}
    assert {name: operators(trace).count("aten::matmul") for name, trace in traces.items()} == {
        "both": 6,
        "host": 6,
        "scheduled": 2,
    }
    for name, trace in traces.items():
        assert f"step of {name}" in (trace / "ASCEND_PROFILER_OUTPUT" / "trace_view.json").read_text()
