# SPDX-License-Identifier: Apache-2.0
"""RMSNorm kernels for vLLM's intermediate operators; importing this module registers them."""

from __future__ import annotations

from torch import Tensor
from vllm import ir

from vllm_ascend import kernels

__all__: list[str] = []


def _fits(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    return weight is not None and variance_size is None and x.dtype == weight.dtype


def _norm_fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _fits(x, weight, variance_size)


def _add_norm_fits(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fits(x, weight, variance_size) and x.dtype == x_residual.dtype


@ir.ops.rms_norm.register_impl("ascend", supports_args=_norm_fits)
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """x `[..., H]` -> `[..., H]`."""
    assert weight is not None
    return kernels.rms_norm(x, weight, epsilon)


@ir.ops.fused_add_rms_norm.register_impl("ascend", supports_args=_add_norm_fits)
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(normalised sum, sum), both `[..., H]`."""
    assert weight is not None
    return kernels.add_rms_norm(x, x_residual, weight, epsilon)
