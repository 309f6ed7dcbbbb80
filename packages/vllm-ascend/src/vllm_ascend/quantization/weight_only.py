# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weights alone are quantised (W4A16, W8A16): of compressed-tensors, GPTQ and AWQ. vLLM reads them, and asks the platform for the product."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    is_layer_skipped,
    unpack_quantized_values_into_int32,
)
from vllm.model_executor.parameter import permute_param_layout_
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from vllm_ascend import compat, kernels
from vllm_ascend.quantization.checks import check_finite
from vllm_ascend.quantization.foreign import takes_groups

__all__ = ["AscendWeightOnlyKernel", "register"]

_WITH_ZERO_POINTS = (scalar_types.uint4, scalar_types.uint8)
_SYMMETRIC = (scalar_types.uint4b8, scalar_types.uint8b128)


class AscendWeightOnlyKernel(MPLinearKernel):
    """The product of one layer: the kernel multiplies `(weight + offset) * scale` as it reads it."""

    _bias: Tensor | None = None

    @classmethod
    def get_min_capability(cls) -> int:
        """Not asked: this platform has no such numbers."""
        return 0

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Weights of 4 or 8 bits, in groups of a multiple of 32 input features, or one for each output feature."""
        inputs, outputs = c.partition_weight_shape
        if c.weight_type not in (_WITH_ZERO_POINTS if c.zero_points else _SYMMETRIC):
            zeros = "with" if c.zero_points else "without"
            return (
                False,
                f"weights of type {c.weight_type} {zeros} zero points have no kernel on an NPU; 4 or 8 bits have",
            )
        if not takes_groups(c.group_size) or (c.group_size != -1 and inputs % c.group_size):
            return False, f"groups of {c.group_size} of {inputs} input features of a rank: a multiple of 32 must divide them"  # fmt: skip
        if c.weight_type.size_bits == 4 and (outputs % 8 or inputs % 8):
            return (
                False,
                f"{inputs} input and {outputs} output features of a rank in 4 bits: both must be multiples of 8",
            )
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring what was loaded into the order of the kernel: a weight `[in, out]` or, in 4 bits, `[in, out / 8]`; scales and offsets `[groups, out]`.

        Raises:
            ValueError: a scale that is not finite.
        """
        weight, scale, zeros = cast("tuple[Any, Any, Any]", self._get_weight_params(layer))  # vLLM's parameters
        kind = self.config.weight_type
        half = 1 << (kind.size_bits - 1)  # the kernel's numbers have a sign, the checkpoint's have none
        permute_param_layout_(weight, input_dim=0, output_dim=1, packed_dim=0)
        permute_param_layout_(scale, input_dim=0, output_dim=1)
        check_finite(layer.prefix, weight_scale=scale)
        values = unpack_quantized_values_into_int32(weight.data, kind, packed_dim=0) - half
        offset = None
        if self.config.zero_points:
            permute_param_layout_(zeros, input_dim=0, output_dim=1, packed_dim=1)
            offset = half - unpack_quantized_values_into_int32(zeros.data, kind, packed_dim=1)
        packed = kernels.packed_int4(values.contiguous()) if kind.size_bits == 4 else values.to(torch.int8)
        replace_parameter(layer, self.w_q_name, packed.contiguous())
        replace_parameter(layer, self.w_s_name, scale.data.contiguous())
        if (name := self.w_zp_name) is not None and offset is not None:
            replace_parameter(layer, name, offset.to(scale.dtype).contiguous())
        elif name is not None:  # of GPTQ, which writes zero points of symmetric weights as well
            layer.register_parameter(name, None)
        self._take_bias(getattr(layer, "bias", None))

    def _take_bias(self, bias: Tensor | None) -> None:
        """Of a product of bfloat16 the kernel takes a bias in float32 alone. It stays where it is when weights are loaded anew, for graphs read it there."""
        if bias is None or bias.dtype != torch.bfloat16:
            return
        if self._bias is None:
            self._bias = bias.data.float()
        else:
            self._bias.copy_(bias.data)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product on this rank: `[..., in] -> [..., out]`."""
        weight, scale, offset = self._get_weight_params(layer)
        if bias is not None and self._bias is not None:
            bias = self._bias
        rows = kernels.weight_only_product(x.reshape(-1, x.shape[-1]), weight, scale, offset, bias)
        return rows.view(*x.shape[:-1], rows.shape[-1])


class _AsksThePlatform:
    """The constructor of vLLM's methods below, without its question whether CUDA's kernel takes the type of the weights."""

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config
        self.quant_type = quant_config.quant_type
        self.input_dtype = None


class _GPTQLinearMethod(_AsksThePlatform, AutoGPTQLinearMethod):
    pass


class _AWQLinearMethod(_AsksThePlatform, AutoAWQMarlinLinearMethod):
    pass


def _awq_method(config: AutoAWQConfig, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
    """The method of a linear layer of an AWQ checkpoint; None of others."""
    if not isinstance(layer, LinearBase):
        return None
    left = is_layer_skipped(
        prefix, config.modules_to_not_convert, config.packed_modules_mapping, match_mode="substring"
    )
    return UnquantizedLinearMethod() if left else _AWQLinearMethod(config)


@cache
def register() -> None:
    """Offer the kernel to vLLM, once a process."""
    register_linear_kernel(AscendWeightOnlyKernel, PlatformEnum.OOT, "mp")
    compat.replace_gptq_and_awq_methods(_GPTQLinearMethod, _awq_method)
