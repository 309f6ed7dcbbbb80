# SPDX-License-Identifier: Apache-2.0
"""Which quantised checkpoints of other tools than ModelSlim are served. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend.config import AscendConfig

__all__ = ["broken"]

_SERVED = "which serves ModelSlim's W8A8 checkpoints ('ascend'), W8A8 in int8 of compressed-tensors for dense models, and those without quantisation"


def broken(vllm_config: Any, config: AscendConfig) -> Iterator[str]:
    """Findings for the quantisation method of a checkpoint, if it is one of vLLM's own.

    Args:
        vllm_config: vLLM's `VllmConfig`, whose `model_config` is there.
        config: this plugin's options.
    """
    method, model = vllm_config.quant_config, vllm_config.model_config
    # Every method of vLLM's own needs kernels for other devices. Those for experts alone ("experts_int8") would leave a dense model as it is.
    if not type(method).__module__.startswith("vllm."):
        return
    if method.get_name() != "compressed-tensors":
        yield f"quantization ({model.quantization!r}) has no kernels in vllm-ascend, {_SERVED}"
        return
    for what, why in _absent(method, model):
        yield f"quantization ('compressed-tensors') with {what} has no kernels in vllm-ascend, {_SERVED}{why}"
    for option in config.of_layers():
        yield f"{option} cannot be used with quantization ('compressed-tensors'), whose weights the option does not know; leave the option out"


def _absent(method: Any, model: Any) -> Iterator[tuple[str, str]]:
    if model.get_num_experts():
        yield "routed experts", ""
    if model.use_mla:
        yield "multi-head latent attention", ""
    if method.kv_cache_scheme is not None:
        yield "a quantised KV cache (kv_cache_scheme)", ""
    if method.transform_config is not None and method.transform_config.config_groups:
        yield "transforms of activations (transform_config)", ""
    for target, scheme in method.target_scheme_map.items():
        weights, inputs = scheme["weights"], scheme["input_activations"]
        if weights is None:
            continue
        if inputs is None or _type(weights) != "int" or _type(inputs) != "int":
            yield f"{_shown(weights)} weights and {_shown(inputs)} activations (target {target!r})", ""
        elif method._is_static_tensor_w8a8(weights, inputs):
            continue
        elif not method._is_dynamic_token_w8a8(weights, inputs) or not inputs.symmetric:
            yield (
                f"{_shown(weights)} weights and {_shown(inputs)} activations (target {target!r})",
                "; weights must be symmetric for each tensor or channel, and activations static for each tensor, or dynamic and symmetric for each token",
            )


def _type(arguments: Any) -> str:
    return str(getattr(arguments.type, "value", arguments.type))


def _shown(arguments: Any) -> str:
    if arguments is None:
        return "unquantised"
    return f"{_type(arguments)}{arguments.num_bits}"
