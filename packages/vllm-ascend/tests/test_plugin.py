# SPDX-License-Identifier: Apache-2.0
"""The plugin itself: what importing it touches, what the doctor says, what options are answered with."""

import json
import os
import subprocess
import sys

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
    done = run(*DOCTOR, ASCEND_SIM="0", COLUMNS="200")
    assert done.returncode == 1
    assert "inactive because torch_npu does not load" in done.stdout
    assert "vllm-ascend[sim]" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


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
        {"weight_nz_mode": 1},
        {"enable_dsa_cp": None, "pa_shape_list": None, "enable_sparse_sfa_c8": False, "enable_sparse_li_c8": False},
        {
            "c8_enable_reshape_optim": True,
            "multistream_dsv4_dsa_overlap": False,
            "scheduler_config": {},
            "rl_config": None,
        },
        {"xlite_graph_config": {"enabled": False, "full_mode": True}, "dynamic_spec_config": {"enabled": False}},
        {"torchair_graph_config": {"enabled": False}, "ascend_scheduler_config": {"enabled": False}},
        {
            "eplb_config": {
                "dynamic_eplb": False,
                "algorithm_execution_interval": 50,
                "eplb_policy_type": 2,
                "load_collection_phase": "all",
            }
        },
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


def test_slot_mapping_follows_the_block_table():
    import torch
    from vllm_ascend.compat import compute_slot_mapping

    starts = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    positions = torch.tensor([14, 15, 16, 0, 33])
    table = torch.tensor([[4, 9, 0], [1, 1, 1], [7, 2, 5]], dtype=torch.int32)
    slots = torch.full((8,), 99)
    compute_slot_mapping(5, 8, starts, positions, table, 3, slots, KV_CACHE_BLOCK_SIZE=16)
    assert slots.tolist() == [4 * 16 + 14, 4 * 16 + 15, 9 * 16, 7 * 16, 5 * 16 + 1, -1, -1, -1]


def test_v2_runner_is_refused(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    from vllm_ascend.platform import AscendPlatform

    with pytest.raises(ValueError, match="V1 model runner only"):
        AscendPlatform.check_and_update_config(SimpleNamespace(additional_config={}))


def test_speculative_decoding_is_refused():
    from types import SimpleNamespace

    from vllm_ascend.platform import AscendPlatform

    wanted = SimpleNamespace(additional_config={}, speculative_config=SimpleNamespace(method="ngram"))
    with pytest.raises(ValueError, match=r"speculative decoding \(method 'ngram'\) is not supported"):
        AscendPlatform.check_and_update_config(wanted)


def test_an_error_without_words_is_a_reason_too(monkeypatch):
    from vllm_ascend import doctor

    def load(name):
        raise ImportError

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    assert "torch_npu does not load (ImportError())" in doctor.inactive_because()


def test_prompt_logprobs_are_refused_where_the_lm_head_is_shared(monkeypatch):
    from vllm import PoolingParams, SamplingParams
    from vllm_ascend.platform import AscendPlatform

    AscendPlatform.validate_request({}, SamplingParams(prompt_logprobs=1))
    monkeypatch.setattr(AscendPlatform, "lmhead_is_shared", True)
    AscendPlatform.validate_request({}, SamplingParams(logprobs=1))
    AscendPlatform.validate_request({}, PoolingParams())
    with pytest.raises(ValueError, match="prompt_logprobs=0: must be None with finegrained_tp_config"):
        AscendPlatform.validate_request({}, SamplingParams(prompt_logprobs=0))
