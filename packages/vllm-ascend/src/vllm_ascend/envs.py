# SPDX-License-Identifier: Apache-2.0
"""The only file that reads or writes environment variables.

Options are given in `additional_config` (see `config`), and not in variables. This file has the variables that vLLM must find set, those of CANN that
are checked at the start, those that users of the public plugin may still have, and one by which the processes of an engine find each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ascend_comm.hccl import DEFAULT_BUFFER_MB

__all__ = [
    "eplb_status_socket",
    "for_report",
    "hccl_buffsize_mb",
    "offloads_without_unified_memory",
    "retired_variables",
    "set_defaults_for_vllm",
    "set_eplb_status_socket",
    "visible_devices",
    "wants_simple_kv_offload",
    "wants_v2_model_runner",
]

# Variable of the public plugin -> (its default, the key of additional_config that took its place).
RETIRED: Mapping[str, tuple[str, str]] = {
    "VLLM_ASCEND_ENABLE_FLASHCOMM1": ("0", "enable_flashcomm1"),
    "VLLM_ASCEND_ENABLE_FLASHCOMM": ("0", "enable_flashcomm1"),
    "VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE": ("0", "flashcomm2_parallel_size"),
    "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE": ("0", "enable_matmul_allreduce"),
    "VLLM_ASCEND_ENABLE_NZ": ("1", "weight_nz_mode"),
    "VLLM_ASCEND_ENABLE_MLAPO": ("1", "enable_mlapo"),
    "VLLM_ASCEND_ENABLE_FUSED_MC2": ("0", "enable_fused_mc2"),
    "VLLM_ASCEND_BALANCE_SCHEDULING": ("0", "enable_balance_scheduling"),
}

_REPORTED = (
    "ASCEND_", "HCCL_", "HCCN_", "NPU_", "PYTORCH_", "TASK_QUEUE_", "TORCH_", "VLLM_", "CPU_AFFINITY_", "LD_LIBRARY_PATH", "OMP_NUM_THREADS",
)  # fmt: skip
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "AUTH", "URL", "HEADER", "COOKIE")

# Segments that grow: without them the KV cache and the activations of steps of many sizes split the device's memory into pieces too small for either.
# Pinned host memory by its size: without the second, torch_npu takes the next power of two, of 33 GiB for the KV cache 64.
ALLOCATOR = "expandable_segments:True,pinned_max_round_threshold_mb:16"
ALLOCATOR_VARIABLES = frozenset({"PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"})


def set_defaults_for_vllm() -> None:
    """Set what vLLM reads before it asks the platform (worker processes are spawned, and the V1 model runner is used), and the allocator of torch_npu.

    torch_npu reads the allocator's settings when it initialises the first device of a process, from one of two variables; with both it raises.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if not os.environ.keys() & ALLOCATOR_VARIABLES:
        os.environ["PYTORCH_NPU_ALLOC_CONF"] = ALLOCATOR


def segments_grow() -> bool:
    """Whether torch_npu's allocator makes segments that grow, by `set_defaults_for_vllm` or by what the user set."""
    return any("expandable_segments:True" in os.environ.get(name, "") for name in ALLOCATOR_VARIABLES)


def wants_v2_model_runner() -> bool:
    """Whether the user asked for the V2 model runner."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("", "0", "false", "False")


def wants_simple_kv_offload() -> bool:
    """Whether vLLM would offload the KV cache by its other connector for that."""
    return os.environ.get("VLLM_USE_SIMPLE_KV_OFFLOAD", "0") != "0"


def visible_devices() -> str | None:
    """ASCEND_RT_VISIBLE_DEVICES, the devices that CANN shows to this process; None where it shows all."""
    return os.environ.get("ASCEND_RT_VISIBLE_DEVICES")


def offloads_without_unified_memory() -> bool:
    """Whether vLLM copies the weights that it keeps in host memory, and makes no view of them."""
    return os.environ.get("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA", "0").strip() not in ("", "0")


def set_eplb_status_socket(path: str) -> None:
    """Let the processes that this one starts know where a worker sends the status of dynamic EPLB to."""
    os.environ["ASCEND_EPLB_STATUS_SOCKET"] = path


def eplb_status_socket() -> str | None:
    """What `set_eplb_status_socket` has set, in this process or in one that it was started by."""
    return os.environ.get("ASCEND_EPLB_STATUS_SOCKET")


def hccl_buffsize_mb() -> int:
    """Size in MB of an HCCL communicator's buffers: HCCL's own variable HCCL_BUFFSIZE, else its default.

    Raises:
        ValueError: it is set to something else than a whole number above 0.
    """
    said = os.environ.get("HCCL_BUFFSIZE", str(DEFAULT_BUFFER_MB))
    if not said.isdecimal() or int(said) == 0:
        raise ValueError(f"environment variable HCCL_BUFFSIZE={said!r}: must be a whole number of MB above 0")
    return int(said)


def for_report() -> dict[str, str]:
    """Variables of CANN, HCCL, torch_npu and vLLM that are set. The value of one that may hold a secret is left out."""
    return {
        name: "(set; its value is not shown)" if any(word in name for word in _SECRET) else value
        for name, value in os.environ.items()
        if name.startswith(_REPORTED)
    }


def retired_variables() -> dict[str, str]:
    """Variables of the public plugin that are set to something else than their default, with the key to use instead."""
    return {
        name: (RETIRED[name][1] if name in RETIRED else "")
        for name, value in os.environ.items()
        if name.startswith("VLLM_ASCEND_") and value != RETIRED.get(name, ("", ""))[0]
    }
