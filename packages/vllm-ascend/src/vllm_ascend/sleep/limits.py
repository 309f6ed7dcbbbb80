# SPDX-License-Identifier: Apache-2.0
"""With what sleep mode cannot be used. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend.config import AscendConfig
from vllm_ascend.kv_offload.limits import named

__all__ = ["BACKEND", "broken"]

BACKEND = "ascend"
"""The name of this plugin's backend, in vLLM's `sleep_mode_backend`."""


def broken(vllm_config: Any, config: AscendConfig) -> Iterator[str]:
    """Findings for what cannot be used with sleep mode; none where it is off.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        config: this plugin's options.
    """
    model = vllm_config.model_config
    if not model.enable_sleep_mode:
        return
    if config.eplb_config.dynamic_eplb:
        yield "option 'eplb_config.dynamic_eplb' (True) cannot be used with enable_sleep_mode: experts may be on their way when memory is given back; leave one of the two out"
    if config.layer_sharding:
        yield (
            f"option 'layer_sharding' ({list(config.layer_sharding)}) cannot be used with enable_sleep_mode: weights of other ranks may be on their way "
            "when memory is given back; leave one of the two out"
        )
    if model.enable_nccl_comm_suspend:
        yield "enable_nccl_comm_suspend (True) is for NCCL, and the groups of an NPU are of HCCL; leave it out"
    if vllm_config.kv_transfer_config is not None:
        yield (
            f"{named(vllm_config)} cannot be used with enable_sleep_mode: the connector knows the KV cache's memory, which "
            "would be given back; leave one of the two out"
        )
