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
from vllm_ascend.attention.limits import composed
from vllm_ascend.config import AscendConfig

__all__ = ["choose", "uncovered"]


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
    if model is None or model.enforce_eager or asked == CUDAGraphMode.NONE:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return ""
    name = "" if asked is None else f"cudagraph_mode {asked.name}: "
    if feature := next(uncovered(vllm_config), None):
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return f"{name}{feature} are not captured in graphs by vllm-ascend; every step runs operator by operator (NONE)"
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    if asked in (None, CUDAGraphMode.FULL_DECODE_ONLY):
        return ""
    why = "steps with prompts are not captured" if asked == CUDAGraphMode.FULL else "nothing is compiled here"
    return f"{name}{why} by vllm-ascend; FULL_DECODE_ONLY is taken instead"


def uncovered(vllm_config: Any) -> Iterator[str]:
    """What of a configuration no test has shown to compute the same tokens in graphs, in the plural."""
    of_models = (features.POOLING, features.ENCODER_DECODER, features.STATES)
    yield from features.used(vllm_config, *of_models, features.PROMPT_EMBEDS, features.LORA, features.KV_CONNECTORS)
    if vllm_config.speculative_config is not None:
        yield "steps with drafted tokens (--speculative-config)"
    # What is wrong with the options is said later, with everything else.
    config, _ = AscendConfig.read(vllm_config.additional_config)
    yield from (f"steps with {option}" for option in config.of_no_graph())
    yield from (f"steps of attention with {what}" for what in composed(vllm_config.model_config))
