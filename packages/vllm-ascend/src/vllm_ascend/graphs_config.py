# SPDX-License-Identifier: Apache-2.0
"""Which steps are captured in graphs: what `cudagraph_mode` asks for, and what of it is taken for the model and the options at hand.

Decoding steps alone are captured (FULL_DECODE_ONLY), and only where a test compares the tokens with those of steps that run operator by operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.config import CUDAGraphMode

__all__ = ["choose", "uncovered"]


def choose(vllm_config: Any) -> str:
    """Set `cudagraph_mode` before vLLM decides about it. Without a word from the user no step is captured.

    Args:
        vllm_config: vLLM's `VllmConfig`, not yet complete.

    Returns:
        What the user should know of it; "" where all that was asked for is done.
    """
    compilation, model = vllm_config.compilation_config, vllm_config.model_config
    asked = compilation.cudagraph_mode
    if asked is None or asked == CUDAGraphMode.NONE or model is None or model.enforce_eager:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return ""
    if feature := next(uncovered(vllm_config), None):
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return f"cudagraph_mode {asked.name}: {feature} are not captured in graphs by vllm-ascend; every step runs operator by operator (NONE)"
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    if asked == CUDAGraphMode.FULL_DECODE_ONLY:
        return ""
    why = "steps with prompts are not captured" if asked == CUDAGraphMode.FULL else "nothing is compiled here"
    return f"cudagraph_mode {asked.name}: {why} by vllm-ascend; FULL_DECODE_ONLY is taken instead"


def uncovered(vllm_config: Any) -> Iterator[str]:
    """What of a configuration no test has shown to compute the same tokens in graphs, in the plural."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    features = {
        "pooling models": model.runner_type != "generate",
        "models with an encoder and a decoder": model.is_encoder_decoder,
        "multimodal models": model.is_multimodal_model,
        "models with multi-head latent attention": model.use_mla,
        "models with a recurrent state": model.is_hybrid or model.is_attention_free,
        "mixtures of experts": model.get_num_experts() > 0,
        f"models quantised by {model.quantization}": model.quantization is not None,
        "steps with drafted tokens (--speculative-config)": vllm_config.speculative_config is not None,
        "prompt embeddings (enable_prompt_embeds)": model.enable_prompt_embeds,
        "pipeline stages (pipeline_parallel_size)": parallel.pipeline_parallel_size > 1,
        "data parallel replicas (data_parallel_size)": parallel.data_parallel_size > 1,
        "KV connectors (kv_transfer_config)": vllm_config.kv_transfer_config is not None,
        f"the options {', '.join(vllm_config.additional_config or {})} of additional_config": bool(
            vllm_config.additional_config
        ),
    }
    yield from (feature for feature, present in features.items() if present)
