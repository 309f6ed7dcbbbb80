# SPDX-License-Identifier: Apache-2.0
"""Kinds of models, and what users switch on in vLLM: each under one name, by which several checks ask for it and speak of it. No vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from vllm_ascend import states

__all__ = [
    "ENCODER_DECODER",
    "KV_CONNECTORS",
    "LORA",
    "MULTIMODAL",
    "POOLING",
    "PROMPT_EMBEDS",
    "SLEEP",
    "STATES",
    "used",
]

# In the plural, as they stand in messages.
POOLING = "pooling models"
ENCODER_DECODER = "models with an encoder and a decoder"
STATES = "models with a recurrent state"
MULTIMODAL = "multimodal models"
PROMPT_EMBEDS = "prompt embeddings (enable_prompt_embeds)"
SLEEP = "sleep mode (enable_sleep_mode)"
LORA = "LoRA adapters (enable_lora)"
KV_CONNECTORS = "KV connectors (kv_transfer_config)"

_PRESENT: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        POOLING: lambda config: config.model_config.runner_type != "generate",
        ENCODER_DECODER: lambda config: config.model_config.is_encoder_decoder,
        STATES: lambda config: states.has_states(config.model_config),
        MULTIMODAL: lambda config: config.model_config.is_multimodal_model,
        PROMPT_EMBEDS: lambda config: config.model_config.enable_prompt_embeds,
        SLEEP: lambda config: config.model_config.enable_sleep_mode,
        LORA: lambda config: config.lora_config is not None,
        KV_CONNECTORS: lambda config: config.kv_transfer_config is not None,
    }
)


def used(vllm_config: Any, *names: str) -> Iterator[str]:
    """Those of these features that a configuration has.

    Args:
        vllm_config: vLLM's `VllmConfig`, whose `model_config` is there.
        names: constants of this module.
    """
    yield from (name for name in names if _PRESENT[name](vllm_config))
