# SPDX-License-Identifier: Apache-2.0
"""Which communication method a deployment may take, without an engine."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ascend_comm import Topology
from ascend_linear import MoeLayers
from vllm_ascend.config import EplbConfig
from vllm_ascend.deployment import Deployment, Model
from vllm_ascend.eplb.placement import placement_of
from vllm_ascend.experts import broken, dispatch_config, most_decoded, uses_mc2

DEEPSEEK = Model(moe=MoeLayers(routed_experts=256, layers=frozenset(range(3, 61))), experts_per_token=8, hidden=7168)
WIDE = Deployment(topology=Topology(32, 32, 1, 1, 1), data_parallel_asked=32, model=DEEPSEEK, expert_parallel=True)


A2, A3, P310 = "Ascend910B3", "Ascend910_9391", "Ascend310P3"


def known(deployment=WIDE, device_name=A3, **eplb):
    """The arguments that `dispatch_config` and `broken` have in common."""
    slots = placement_of(EplbConfig(**eplb), deployment).slots_per_rank
    return {"deployment": deployment, "slots_per_rank": slots, "device_name": device_name, "decoding_tokens": 64}


def test_dispatch_config_of_a_deployment_with_redundant_experts():
    found = dispatch_config(**known(num_redundant_experts=32))
    assert (found.ep_size, found.tp_size, found.experts_per_rank, found.top_k) == (32, 1, 9, 8)
    assert found.mc2_capacity == 64
    assert uses_mc2(found)


@pytest.mark.parametrize(
    ("device_name", "model", "ep", "mc2"),
    [
        (A3, {}, True, True),
        (A2, {}, True, True),
        (P310, {}, True, False),
        (A3, {}, False, False),
        (A3, {"experts_per_token": 17}, True, False),
        (A3, {"half_precision": False}, True, False),
        (A3, {"hidden": 7169}, True, False),
        (A3, {"hidden": 8224}, True, False),
    ],
)
def test_mc2_is_used_where_its_kernels_take_the_model(device_name, model, ep, mc2):
    deployment = replace(WIDE, model=replace(DEEPSEEK, **model), expert_parallel=ep)
    assert uses_mc2(dispatch_config(**known(deployment, device_name))) is mc2


def test_a_small_hccl_buffer_is_a_finding():
    (finding,) = broken(**known(), hccl_buffsize_mb=200)
    assert finding == (
        "environment variable HCCL_BUFFSIZE (200 MB) must be 478 or more for MC2: 64 tokens of 7168 features a step, "
        "8 experts on each of 32 ranks; or lower max_num_seqs, so that a step decodes fewer than 64 tokens"
    )
    assert not list(broken(**known(), hccl_buffsize_mb=478))
    assert not list(broken(**known(device_name=P310), hccl_buffsize_mb=1))


def test_an_unknown_chip_is_a_finding_where_ranks_share_experts():
    (finding,) = broken(**known(device_name="Ascend1000X"), hccl_buffsize_mb=2000)
    assert finding.startswith(
        "experts over 32 ranks (enable_expert_parallel): device_name='Ascend1000X' is of no known family"
    )
    alone = replace(WIDE, expert_parallel=False)
    assert not list(broken(**known(alone, "Ascend1000X"), hccl_buffsize_mb=1))


def test_the_chip_is_known_without_initialising_a_device():
    """So the parent process can check it, and its forked workers can still use their devices."""
    asked = "import torch; print(torch.npu.get_device_name(0), torch.npu.is_initialized())"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=1800, check=True)
    assert done.stdout.split()[-1] == "False"


def test_what_is_drafted_is_decoded_too():
    scheduler = SimpleNamespace(max_num_seqs=16)
    assert most_decoded(SimpleNamespace(scheduler_config=scheduler, num_speculative_tokens=0)) == 16
    assert most_decoded(SimpleNamespace(scheduler_config=scheduler, num_speculative_tokens=3)) == 64
