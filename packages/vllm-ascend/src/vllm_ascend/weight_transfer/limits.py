# SPDX-License-Identifier: Apache-2.0
"""With what weights from a trainer cannot be received. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend.config import AscendConfig
from vllm_ascend.weight_transfer import BACKEND

__all__ = ["broken"]

# Backends of vLLM that need CUDA: NCCL, its inter-process memory, or what is built on them.
_OF_CUDA = ("ipc", "modelexpress", "nccl", "nccl_m2n", "sharded_rdt", "sparse_nccl")


def broken(vllm_config: Any, config: AscendConfig) -> Iterator[str]:
    """Findings for what cannot be used with weight transfer; none where it is off.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        config: this plugin's options.
    """
    transfer = vllm_config.weight_transfer_config
    if transfer is None:
        return
    if transfer.backend in _OF_CUDA:
        yield f"weight_transfer_config.backend ({transfer.backend!r}) needs CUDA; give {BACKEND!r}, its counterpart on an NPU"
    if config.eplb_config.dynamic_eplb:
        yield "option 'eplb_config.dynamic_eplb' (True) cannot be used with weight_transfer_config: weights cannot be loaded anew while experts move; leave one of the two out"
    if config.layer_sharding:
        yield (
            f"option 'layer_sharding' ({list(config.layer_sharding)}) cannot be used with weight_transfer_config: the ranks hold the weights of different "
            "layers; leave one of the two out"
        )
