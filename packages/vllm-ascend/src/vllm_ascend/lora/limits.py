# SPDX-License-Identifier: Apache-2.0
"""With what LoRA adapters cannot be used. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend import states
from vllm_ascend.config import AscendConfig

__all__ = ["broken"]


def broken(vllm_config: Any, config: AscendConfig) -> Iterator[str]:
    """Findings for what cannot be used with LoRA adapters; none where they are off.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        config: this plugin's options.
    """
    if vllm_config.lora_config is None or vllm_config.model_config is None:
        return
    yield from (
        f"{what} cannot be used with LoRA adapters: vLLM's LoRA layers call a layer's product themselves, and pass by what the option puts around it; leave the option or "
        "--enable-lora out"
        for what in config.of_layers()
    )
    yield from (
        f"LoRA adapters (--enable-lora) cannot be used with {what}: {why}" for what, why in _of_the_engine(vllm_config)
    )


def _of_the_engine(vllm_config: Any) -> Iterator[tuple[str, str]]:
    model, adapters, parallel = vllm_config.model_config, vllm_config.lora_config, vllm_config.parallel_config
    leave = "leave --enable-lora out, and merge the adapter into the model"
    if model.runner_type != "generate":
        yield "a pooling model", f"no test has shown it to be right; {leave}"
    if model.use_mla:
        yield "multi-head latent attention", f"its kernels read the weight of kv_b_proj without its adapter; {leave}"
    if states.has_states(model):
        yield "a model with a recurrent state", f"its layers do not call the layers that vLLM adds adapters to; {leave}"
    if model.is_encoder_decoder:
        yield (
            "a model with an encoder and a decoder",
            f"the encoder's rows are not those that vLLM has the adapters of; {leave}",
        )
    if model.is_multimodal_model:
        yield (
            "a multimodal model",
            f"its embedding layer is given a part of the rows that vLLM has the adapters of; {leave}",
        )
    if model.enable_prompt_embeds:
        yield (
            "enable_prompt_embeds (True)",
            "the embedding layer is given a part of the rows that vLLM has the adapters of; leave one of the two out",
        )
    if model.get_num_experts() and adapters.target_modules is None:
        yield (
            "adapters of routed experts",
            "vLLM's LoRA layer for these is made for its own kernels; name the layers that adapters may change, without experts: "
            "--lora-target-modules q_proj k_proj v_proj o_proj",
        )
    if model.get_num_experts() and parallel.data_parallel_size > 1:
        yield (
            f"data_parallel_size ({parallel.data_parallel_size}) of a mixture of experts",
            "no test has shown it to be right; set it to 1, and start several servers",
        )
    if vllm_config.speculative_config is not None:
        yield "speculative decoding", "no test has shown it to be right; leave one of the two out"
