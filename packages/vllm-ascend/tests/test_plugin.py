# SPDX-License-Identifier: Apache-2.0
"""The plugin itself: what importing it touches, what the doctor says, what options are answered with."""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
from vllm_ascend import envs
from vllm_ascend.config import AscendConfig

DOCTOR = (sys.executable, "-m", "vllm_ascend.cli", "doctor")


def run(*command, **env):
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ | env)


def test_import_touches_nothing():
    code = "import sys, vllm_ascend; print(sorted({'torch', 'torch_npu', 'vllm', 'numpy'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_only_kernels_names_torch_npu():
    from pathlib import Path

    import vllm_ascend

    root = Path(vllm_ascend.__file__).parent
    naming = {path.name for path in root.rglob("*.py") if "import torch_npu" in path.read_text()}
    assert naming == {"kernels.py"}


def test_doctor_is_active_on_the_simulated_npu():
    done = run(*DOCTOR, "--json")
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert done.returncode == 0
    assert report["active"] is True
    assert report["simulated"] is True
    assert report["versions"]["vllm"].startswith("0.32.0")
    assert len(report["devices"]) == 8


def test_doctor_explains_without_cann():
    """Torch cannot even be imported there; the doctor still runs and names the remedy."""
    broken = run(sys.executable, "-c", "import torch", ASCEND_SIM="0")
    assert broken.returncode != 0
    assert "libhccl.so" in broken.stderr
    done = run(*DOCTOR, ASCEND_SIM="0")
    assert done.returncode == 1
    assert "inactive because torch_npu does not load (libhccl.so: cannot open shared object file" in done.stdout
    assert "not active because ASCEND_SIM=0 switches it off; on an Ascend host install CANN and source" in done.stdout
    assert "vllm-ascend[sim]" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value", "because"),
    [
        ("ASCEND_SIM", "yes", "ASCEND_SIM is 'yes'; allowed: 0 (off), 1 (on)"),
        ("ASCEND_SIM_MEMORY", "lots", "ASCEND_SIM_MEMORY is 'lots'; allowed: a number with one of KiB, MiB, GiB"),
        ("ASCEND_SIM_MEMORY", "9" * 400, "ASCEND_SIM_MEMORY is '999"),
        ("ASCEND_SIM_DEVICES", "0", "ASCEND_SIM_DEVICES is '0'; allowed: 1 to 64"),
        ("ASCEND_SIM_SOC", "Ascend1", "ASCEND_SIM_SOC is 'Ascend1'; allowed: Ascend910B3, Ascend910_9391"),
        ("ASCEND_SIM_STRICT", "2", "ASCEND_SIM_STRICT is '2'; allowed: 1 (as hardware), 0 (relaxed)"),
        ("ASCEND_RT_VISIBLE_DEVICES", "99", "torch_npu sees no NPU with ASCEND_RT_VISIBLE_DEVICES='99'"),
        ("ASCEND_RT_VISIBLE_DEVICES", "", "torch_npu sees no NPU with ASCEND_RT_VISIBLE_DEVICES=''"),
    ],
)
def test_doctor_names_the_variable_that_is_wrong(name, value, because):
    done = run(*DOCTOR, **{name: value})
    assert done.returncode == 1
    assert "plugin: inactive because" in done.stdout
    assert because in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_doctor_says_what_the_simulator_says(tmp_path):
    (tmp_path / "cache").write_text("")
    done = run(*DOCTOR, "--json", ASCEND_SIM_CACHE=str(tmp_path / "cache"))
    report = json.loads(done.stdout)
    assert report["reason"].startswith("the simulated NPU does not run: ")
    assert report["reason"].endswith("or set ASCEND_SIM_CACHE to a folder of your own")
    assert (report["active"], report["simulated"], report["versions"]["CANN"]) == (False, False, "missing")


def test_doctor_counts_the_visible_devices():
    done = run(*DOCTOR, "--json", ASCEND_RT_VISIBLE_DEVICES="2,5,99,3")
    assert len(json.loads(done.stdout[done.stdout.index("{") :])["devices"]) == 2


def test_the_remedy_fits_a_host_whose_cann_is_not_sourced(monkeypatch, tmp_path):
    from vllm_ascend import doctor

    def load(name):
        raise RuntimeError("a backend extension failed") from OSError("libhccl.so: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    monkeypatch.setattr(doctor, "_simulator", doctor.Simulator)
    said = doctor.inactive_because()
    assert said.startswith(
        "torch_npu does not load (libhccl.so: cannot open shared object file); on an Ascend host install CANN"
    )
    script = tmp_path / "set_env.sh"
    script.touch()
    monkeypatch.setattr(doctor, "CANN_SCRIPTS", (str(tmp_path / "absent.sh"), str(script)))
    assert f"run `source {script}`, for CANN is installed" in doctor.inactive_because()


def test_doctor_names_a_version_that_does_not_fit(monkeypatch):
    from vllm_ascend import doctor

    monkeypatch.setattr(doctor, "REQUIRED", {"torch": "2.12.0"})
    assert doctor.inactive_because().startswith("torch 2.13.0")
    assert "needs 2.12.0" in doctor.inactive_because()


def test_register_says_why_it_is_inactive():
    code = "import vllm_ascend; print(vllm_ascend.register())"
    done = run(sys.executable, "-c", code, ASCEND_SIM="0")
    assert done.stdout.strip().endswith("None")
    assert "vllm-ascend is inactive because" in done.stderr


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"enable_flashcomm1": False},
        {"refresh": True},
        {"gdn_prefill_backend": "auto"},
        {"enable_dsa_cp": None, "pa_shape_list": None, "enable_sparse_sfa_c8": False, "enable_sparse_li_c8": False},
        {
            "c8_enable_reshape_optim": True,
            "multistream_dsv4_dsa_overlap": False,
            "scheduler_config": {},
            "rl_config": None,
        },
        {"xlite_graph_config": {"enabled": False, "full_mode": True}, "dynamic_spec_config": {"enabled": False}},
        {"torchair_graph_config": {"enabled": False}, "ascend_scheduler_config": {"enabled": False}},
    ],
)
def test_options_that_ask_for_nothing_new(config):
    assert AscendConfig.of(config) == AscendConfig()


def test_the_interval_that_the_public_plugin_starts_with():
    assert (
        AscendConfig.of(
            {"eplb_config": {"expert_heat_collection_interval": 600}}
        ).eplb_config.expert_heat_collection_interval
        == 600
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"enable_dsa_cp": True}, r"'enable_dsa_cp' \(True\) of the public plugin is not supported"),
        ({"enable_flashcom1": True}, r"unknown option 'enable_flashcom1'.*did you mean enable_flashcomm1"),
        ({"zzz": 1}, r"unknown option 'zzz'.*docs/options.md"),
        ([1], r"must be a JSON object, got list"),
    ],
)
def test_options_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        AscendConfig.of(config)


def test_variables_of_the_public_plugin(monkeypatch):
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "1")
    assert envs.retired_variables() == {}
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "2")
    with pytest.raises(ValueError, match=r"VLLM_ASCEND_ENABLE_NZ.*weight_nz_mode"):
        AscendConfig.of({}, envs.retired_variables())


ALLOCATOR = """
import os, vllm_ascend
vllm_ascend.register()
import torch
try:
    torch.zeros(1, device="npu")
    print("initialised", os.environ.get("PYTORCH_NPU_ALLOC_CONF"))
except Exception as error:
    print("failed", error)
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "expandable_segments:True,pinned_max_round_threshold_mb:16"),
        ({"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "None"),  # with both variables torch_npu raises
    ],
)
def test_the_allocator_has_segments_that_grow_unless_the_user_says_otherwise(given, found):
    code = ALLOCATOR + "print(torch.npu.memory_snapshot()[0]['is_expandable'])"
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, env=environment)
    assert f"initialised {found}" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(not given)
    assert "setting failure" not in done.stderr


def test_slot_mapping_follows_the_block_table():
    import torch
    from vllm_ascend.triton_kernels import compute_slot_mapping

    starts = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    positions = torch.tensor([14, 15, 16, 0, 33])
    table = torch.tensor([[4, 9, 0], [1, 1, 1], [7, 2, 5]], dtype=torch.int32)
    slots = torch.full((8,), 99)
    compute_slot_mapping(5, 8, starts, positions, table, 3, slots, KV_CACHE_BLOCK_SIZE=16)
    assert slots.tolist() == [4 * 16 + 14, 4 * 16 + 15, 9 * 16, 7 * 16, 5 * 16 + 1, -1, -1, -1]


class AnswersEveryName:
    """As llvmlite's library of functions: it has no `__dict__`, and answers that name with another object."""

    __slots__ = ()

    def __getattr__(self, name):
        return object()


def test_the_slot_mapping_is_replaced_whatever_other_modules_hold(monkeypatch):
    from vllm.v1.worker.block_table import ComputeSlotMappingKernel
    from vllm_ascend import compat, triton_kernels

    module = ModuleType("some_library")
    module.functions = AnswersEveryName()
    monkeypatch.setitem(sys.modules, "some_library", module)
    monkeypatch.setattr(ComputeSlotMappingKernel, "kernel", ComputeSlotMappingKernel.kernel)
    name = "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel"
    compat.replace_triton_kernels({name: triton_kernels.compute_slot_mapping})
    assert ComputeSlotMappingKernel.kernel.func is triton_kernels.compute_slot_mapping


def test_streams_and_events_of_cuda_are_classes(monkeypatch):
    import torch
    from vllm_ascend import compat

    for name in ("Stream", "Event", "stream", "current_stream", "default_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    compat.alias_cuda_streams()
    event = torch.cuda.Event(blocking=True)
    assert isinstance(event, torch.cuda.Event)
    event.record(torch.cuda.Stream())
    event.synchronize()
    assert not isinstance(3, torch.cuda.Event)


def test_an_error_without_words_is_a_reason_too(monkeypatch):
    from vllm_ascend import doctor

    def load(name):
        raise ImportError

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    monkeypatch.setattr(doctor, "_simulator", doctor.Simulator)
    assert "torch_npu does not load (ImportError())" in doctor.inactive_because()


def test_memory_usage_is_of_now_and_keeps_the_peak():
    import torch
    from vllm_ascend.platform import AscendPlatform

    before = AscendPlatform.get_current_memory_usage()
    tensor = torch.zeros(1 << 20, dtype=torch.int8, device="npu")
    peak = AscendPlatform.get_current_memory_usage()
    assert peak >= before + tensor.numel()  # the allocator rounds up
    del tensor
    assert AscendPlatform.get_current_memory_usage() == before
    assert torch.npu.max_memory_allocated() >= peak


def test_prompt_logprobs_are_refused_where_the_lm_head_is_shared(monkeypatch):
    from vllm import PoolingParams, SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm_ascend.platform import AscendPlatform

    AscendPlatform.validate_request({}, SamplingParams(prompt_logprobs=1))
    monkeypatch.setattr(AscendPlatform, "lmhead_is_shared", True)
    AscendPlatform.validate_request({}, SamplingParams(logprobs=1))
    AscendPlatform.validate_request({}, PoolingParams())
    with pytest.raises(VLLMValidationError, match=r"prompt_logprobs, or echo with logprobs.* are not available with"):
        AscendPlatform.validate_request({}, SamplingParams(prompt_logprobs=0))
