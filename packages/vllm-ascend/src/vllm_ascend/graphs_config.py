# SPDX-License-Identifier: Apache-2.0
"""Which steps are captured in graphs: what `cudagraph_mode` asks for, and what of it is taken for the model and the options at hand.

Decoding steps are captured (FULL_DECODE_ONLY) unless the user says otherwise, and only where a test compares the tokens with those of another implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.config.vllm import OptimizationLevel

from vllm_ascend import features
from vllm_ascend.attention.limits import LATENT_QUERIES, composed
from vllm_ascend.kv_offload import limits as kv_offload
from vllm_ascend.speculative import support

__all__ = ["choose", "uncovered"]

_PASSES_OF_DRAFTS = "steps in which every request has all its drafted tokens are captured in graphs by vllm-ascend; the passes of the model that drafts are not, and run operator by operator"


def choose(vllm_config: Any) -> str:
    """Set `cudagraph_mode` before vLLM decides about it.

    Args:
        vllm_config: vLLM's `VllmConfig`, not yet complete.

    Returns:
        What the user should know of it; "" where all that was asked for is done.
    """
    compilation, model = vllm_config.compilation_config, vllm_config.model_config
    asked = compilation.cudagraph_mode
    if asked is None and vllm_config.optimization_level == OptimizationLevel.O0:
        asked = CUDAGraphMode.NONE
    if model is not None and model.runner_type == "draft":
        return ""  # vLLM makes a configuration for the draft model from that of the model that was decided about, and both share what is set here
    if model is None or model.enforce_eager or asked == CUDAGraphMode.NONE:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return ""
    name = "" if asked is None else f"cudagraph_mode {asked.name}: "
    if feature := next(uncovered(vllm_config), None):
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return f"{name}{feature} are not captured in graphs by vllm-ascend; every step runs operator by operator (NONE)"
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    if asked not in (None, CUDAGraphMode.FULL_DECODE_ONLY):
        why = "steps with prompts are not captured" if asked == CUDAGraphMode.FULL else "nothing is compiled here"
        return f"{name}{why} by vllm-ascend; FULL_DECODE_ONLY is taken instead"
    return _PASSES_OF_DRAFTS if support.drafts_by_model(vllm_config) else ""


def uncovered(vllm_config: Any) -> Iterator[str]:
    """What of a configuration no test has shown to compute the same tokens in graphs, in the plural."""
    of_models = (features.POOLING, features.ENCODER_DECODER, features.STATES)
    yield from features.used(vllm_config, *of_models, features.PROMPT_EMBEDS)
    if not kv_offload.chosen(vllm_config):  # which does nothing in a layer
        yield from features.used(vllm_config, features.KV_CONNECTORS)
    drafted = vllm_config.num_speculative_tokens
    if vllm_config.lora_config is not None and vllm_config.model_config.enable_sleep_mode:
        yield "LoRA adapters with sleep mode"
    if vllm_config.model_config.use_mla and drafted >= LATENT_QUERIES:
        yield f"steps of latent attention with {drafted} drafted tokens (at most {LATENT_QUERIES - 1} fit the kernel)"
    yield from (f"steps of attention with {what}" for what in composed(vllm_config.model_config))
