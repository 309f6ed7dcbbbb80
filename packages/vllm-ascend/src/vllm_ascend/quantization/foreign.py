# SPDX-License-Identifier: Apache-2.0
"""Which quantised checkpoints of other tools than ModelSlim are served. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend.config import AscendConfig

__all__ = ["broken", "takes_groups"]

_SERVED = (
    "which serves ModelSlim's W8A8 checkpoints ('ascend'), of dense models W8A8 in int8, W4A16 and W8A16 of compressed-tensors, GPTQ and AWQ, and those without "
    "quantisation"
)
_GROUPS = "groups must have a multiple of 32 input features, or all of them"


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
    name = method.get_name()
    if name not in _ABSENT:
        yield f"quantization ({model.quantization!r}) has no kernels in vllm-ascend, {_SERVED}"
        return
    for what, why in (*_absent_of_all(model), *_ABSENT[name](method)):
        yield f"quantization ({name!r}) with {what} has no kernels in vllm-ascend, {_SERVED}{why}"
    for option in config.of_layers():
        yield f"{option} cannot be used with quantization ({name!r}), whose weights the option does not know; leave the option out"


def _absent_of_all(model: Any) -> Iterator[tuple[str, str]]:
    if model.get_num_experts():
        yield "routed experts", ""
    if model.use_mla:
        yield "multi-head latent attention", ""


def _absent_of_compressed(method: Any) -> Iterator[tuple[str, str]]:
    if method.kv_cache_scheme is not None:
        yield "a quantised KV cache (kv_cache_scheme)", ""
    if method.transform_config is not None and method.transform_config.config_groups:
        yield "transforms of activations (transform_config)", ""
    for target, scheme in method.target_scheme_map.items():
        weights, inputs = scheme["weights"], scheme["input_activations"]
        if weights is None or _is_weight_only(method, scheme):
            continue
        shown = f"{_shown(weights)} weights and {_shown(inputs)} activations (target {target!r})"
        if inputs is None and _type(weights) == "int":
            yield (
                shown,
                f"; of weights alone 4 or 8 bits must be packed ('pack-quantized') for each channel or group, without an order of activations (actorder): {_GROUPS}",
            )
        elif inputs is None or _type(weights) != "int" or _type(inputs) != "int":
            yield shown, ""
        elif not method._is_static_tensor_w8a8(weights, inputs) and (
            not method._is_dynamic_token_w8a8(weights, inputs) or not inputs.symmetric
        ):
            yield (
                shown,
                "; weights must be symmetric for each tensor or channel, and activations static for each tensor, or dynamic and symmetric for each token",
            )


def takes_groups(size: int | None) -> bool:
    """Whether the product with weights that are quantised alone takes groups of so many input features; None and -1 stand for all of them."""
    return size in (None, -1) or size % 32 == 0


def _is_weight_only(method: Any, scheme: Any) -> bool:
    """Whether a scheme quantises weights alone, as the product takes them."""
    weights, form = scheme["weights"], scheme.get("format") or method.quant_format
    ordered = _value(weights.actorder) in ("group", "dynamic")
    return (
        _type(weights) == "int"
        and weights.num_bits in (4, 8)
        and method._is_wNa16_group_channel(weights, scheme["input_activations"])
        and _value(form) == "pack-quantized"
        and takes_groups(weights.group_size)
        and not ordered
    )


def _absent_of_gptq_and_awq(method: Any) -> Iterator[tuple[str, str]]:
    sizes = {method.group_size, *(rule["group_size"] for rule in getattr(method, "dynamic", {}).values() if "group_size" in rule)}  # fmt: skip
    for size in sorted(sizes):
        if not takes_groups(size):
            yield f"groups of {size}", f"; {_GROUPS}"
    if method.lm_head_quantized:
        yield "a quantised LM head (lm_head)", ""
    if not getattr(method, "zero_point", True):
        yield "symmetric weights of AWQ (zero_point False)", ""


_ABSENT = {
    "compressed-tensors": _absent_of_compressed,
    "auto_gptq": _absent_of_gptq_and_awq,
    "auto_awq": _absent_of_gptq_and_awq,
}


def _value(named: Any) -> str:
    return str(getattr(named, "value", named))


def _type(arguments: Any) -> str:
    return _value(arguments.type)


def _shown(arguments: Any) -> str:
    if arguments is None:
        return "unquantised"
    return f"{_type(arguments)}{arguments.num_bits}"
