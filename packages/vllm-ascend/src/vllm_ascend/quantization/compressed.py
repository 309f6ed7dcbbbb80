# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of compressed-tensors with int8 weights and int8 activations (W8A8): vLLM reads them, and asks the platform for the product."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from ascend_linear import W8A8Dynamic, W8A8Static
from torch import Tensor
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.platforms.interface import PlatformEnum

from vllm_ascend import kernels, parallel
from vllm_ascend.quantization.checks import check_finite

__all__ = ["AscendInt8Kernel", "register"]


class AscendInt8Kernel(Int8ScaledMMLinearKernel):
    """The product of one layer, by those of ascend-linear."""

    _product: W8A8Dynamic | W8A8Static | None = None

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On every chip."""
        return True, None

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Dynamic activations must be symmetric: the kernel finds a scale for each token, and no zero point."""
        if not c.is_static_input_scheme and not c.input_symmetric:
            return False, "dynamic activations with a zero point have no kernel on an NPU"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the product of what was loaded. The tensors of the checkpoint stay, so that it can be loaded anew.

        Raises:
            ValueError: a scale that is not finite.
        """
        scale = layer.weight_scale.data.reshape(-1)
        if not self.config.is_channelwise:  # one number for each of the layers that are fused
            scale = torch.cat([one.expand(width) for one, width in zip(scale, layer.logical_widths, strict=True)])
        check_finite(layer.prefix, weight_scale=scale)
        made = self._static(layer, scale) if self.config.is_static_input_scheme else W8A8Dynamic(weight_scale=scale.contiguous(), output_dtype=layer.params_dtype)  # fmt: skip
        if self._product is None:
            self._product = made
        else:
            self._product.replace(made)  # type: ignore[arg-type]  # a layer keeps its kind
        shared = parallel.current()
        if shared is not None and shared.config.weight_nz_mode:
            layer.weight.data = kernels.in_fractal_nz(layer.weight.data)

    def _static(self, layer: Any, weight_scale: Tensor) -> W8A8Static:
        check_finite(layer.prefix, input_scale=layer.input_scale)
        zero_point = layer.input_zero_point
        offset = torch.zeros_like(layer.input_scale) if zero_point is None else zero_point.data.float()
        # Of this rank's part of the inputs, so that each rank adds its own.
        sums = layer.weight.data.sum(dim=1, dtype=torch.int32)
        return W8A8Static(
            input_scale=layer.input_scale.data,
            input_offset=offset,
            deq_scale=layer.input_scale.data * weight_scale,
            quant_bias=None if zero_point is None else (-zero_point.data.to(torch.int32) * sums),
            output_dtype=layer.params_dtype,
        )

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product on this rank: `[..., in] -> [..., out]`."""
        assert self._product is not None  # vLLM processes weights before it computes
        return self._product.product(x, layer.weight, bias)


@cache
def register() -> None:
    """Offer the kernel to vLLM, once a process."""
    register_linear_kernel(AscendInt8Kernel, PlatformEnum.OOT, "int8")
