# SPDX-License-Identifier: Apache-2.0
"""Every NPU kernel that vllm-ascend itself calls, but those of attention (`attention/kernels.py`). The only file of this package that names torch_npu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

__all__ = [
    "add_rms_norm",
    "apply_rotary",
    "in_fractal_nz",
    "npu",
    "packed_int4",
    "rms_norm",
    "rotary_mul",
    "split_columns",
    "swiglu",
    "top_k_top_p",
    "weight_only_product",
]


@cache
def npu() -> ModuleType:
    """torch_npu. `device.py` has what is asked of it besides kernels."""
    try:
        import torch_npu
    except ImportError as error:
        raise RuntimeError(f"vllm-ascend needs torch-npu: uv pip install torch-npu==2.13.0 ({error})") from error
    return torch_npu  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension; x `[..., H]`, weight `[H]`."""
    return npu().npu_rms_norm(x, weight, epsilon)[0]  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`."""
    y, _, total = npu().npu_add_rms_norm(x, residual, weight, epsilon)
    return y, total


def swiglu(x: Tensor) -> Tensor:
    """`silu(x[..., :I]) * x[..., I:]`; x `[..., 2I]`."""
    return npu().npu_swiglu(x)  # type: ignore[no-any-return]


MOST_TOP_K = 1024
"""The largest k of `top_k_top_p`."""


def top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """A row's logits where they are among its k largest, and of these among the fewest whose probabilities add up to p; -inf elsewhere.

    Args:
        logits: `[rows, vocabulary]`.
        k: int32 `[rows]`, from 1 to `MOST_TOP_K` and to the vocabulary; or None.
        p: `[rows]`, of the logits' data type, from 0 to 1; or None, but not both.
    """
    return npu().npu_top_k_top_p(logits, p, k)  # type: ignore[no-any-return]


def split_columns(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Copies of consecutive columns of x `[..., sum of widths]`, each contiguous, in one kernel.

    Views of them would not do: attention, the rotary embedding and the write to the cache read contiguous tensors, and would need a copy each.
    """
    parts = [x.new_empty((*x.shape[:-1], width)) for width in widths]
    torch.split_with_sizes_copy(x, list(widths), dim=-1, out=parts)
    return parts


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate both in place, halves against each other; query `[T, N, D]`, key `[T, Nkv, D]`, cos and sin `[T, 1, D]`; D 64 or 128."""
    return npu().npu_apply_rotary_pos_emb(query, key, cos, sin, "TND", "half")  # type: ignore[no-any-return]


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x `[1, T, N, D]` with cos and sin `[1, T, 1, D]`; halves against each other, or even against odd where interleaved."""
    return npu().npu_rotary_mul(x, cos, sin, "interleave" if interleaved else "half")  # type: ignore[no-any-return]


_FRACTAL_NZ = 29  # CANN's number of the format


def in_fractal_nz(weight: Tensor) -> Tensor:
    """A copy of a weight in the format in which W8A8 products read it fastest; its numbers and its shape are the same."""
    return npu().npu_format_cast(weight, _FRACTAL_NZ)  # type: ignore[no-any-return]


def packed_int4(values: Tensor) -> Tensor:
    """int32 `[K, N]`, -8 to 7, as int32 `[K, N / 8]` with eight values in each, in the order of `weight_only_product`."""
    return npu().npu_convert_weight_to_int4pack(values)  # type: ignore[no-any-return]


def weight_only_product(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x @ ((weight + offset) * scale) + bias`, summed in float32.

    Args:
        x: `[T, K]`.
        weight: int8 `[K, N]`, or `packed_int4` of it.
        scale, offset: `[G, N]` in x's type, for G groups of K / G input features each, a multiple of 32.
        bias: `[N]`; in float32 where x is bfloat16.
    """
    groups = len(scale)
    return npu().npu_weight_quant_batchmatmul(  # type: ignore[no-any-return]
        x,
        weight,
        antiquant_scale=scale,
        antiquant_offset=offset,
        bias=bias,
        antiquant_group_size=0 if groups == 1 else x.shape[1] // groups,
    )
