# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: their description, and what it says handed to the W8A8 products of ascend-linear and ascend-moe."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make the quantisation method "ascend" known to vLLM, in every process. More calls do nothing new."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_ascend.quantization.config import METHOD, AscendQuantizationConfig

    register_quantization_config(METHOD)(AscendQuantizationConfig)
