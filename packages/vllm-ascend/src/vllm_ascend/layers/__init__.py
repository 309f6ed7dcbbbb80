# SPDX-License-Identifier: Apache-2.0
"""Adapters that hand vLLM's layers to NPU kernels and to the libraries. Called by the worker before it builds the model."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["register"]


@cache
def register() -> Any:
    """Put every replacement layer in vLLM's registry, once a process. What is returned keeps operators defined, and is cached for that."""
    from vllm_ascend.layers import (
        activation,
        gpt_oss,
        linear,
        moe,
        rotary,
        routing,
        topk,
        tower,
        transformers_moe,
        transformers_tower,
        vocab,
    )

    activation.register()
    linear.register()
    moe.register()
    rotary.register()
    routing.register()
    tower.register()
    transformers_moe.register()
    transformers_tower.register()
    gpt_oss.register()
    vocab.register()
    return topk.define()
