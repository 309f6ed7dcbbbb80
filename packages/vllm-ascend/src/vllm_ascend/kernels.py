# SPDX-License-Identifier: Apache-2.0
"""Every NPU kernel that vllm-ascend itself calls. The only file of this package that names torch_npu."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "add_rms_norm",
    "apply_rotary",
    "attention",
    "rms_norm",
    "rotary_mul",
    "scatter_kv",
    "swiglu",
]

SPARSE_NONE = 0  # no mask: every query sees every key
SPARSE_CAUSAL = 3  # the causal triangle ends at the last key of each request
SPARSE_BAND = 4  # as before, within a window
MASK_SIZE = 2048  # side of the compressed mask that modes 3 and 4 take, whatever the lengths


@cache
def _npu() -> ModuleType:
    try:
        import torch_npu
    except ImportError as error:
        raise RuntimeError(f"vllm-ascend needs torch-npu: uv pip install torch-npu==2.13.0 ({error})") from error
    return torch_npu  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension; x `[..., H]`, weight `[H]`."""
    return _npu().npu_rms_norm(x, weight, epsilon)[0]  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`."""
    y, _, total = _npu().npu_add_rms_norm(x, residual, weight, epsilon)
    return y, total


def swiglu(x: Tensor) -> Tensor:
    """`silu(x[..., :I]) * x[..., I:]`; x `[..., 2I]`."""
    return _npu().npu_swiglu(x)  # type: ignore[no-any-return]


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate both in place, halves against each other; query `[T, N, D]`, key `[T, Nkv, D]`, cos and sin `[T, 1, D]`; D 64 or 128."""
    return _npu().npu_apply_rotary_pos_emb(query, key, cos, sin, "TND", "half")  # type: ignore[no-any-return]


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x `[1, T, N, D]` with cos and sin `[1, T, 1, D]`; halves against each other, or even against odd where interleaved."""
    return _npu().npu_rotary_mul(x, cos, sin, "interleave" if interleaved else "half")  # type: ignore[no-any-return]


def scatter_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write key and value `[T, Nkv, D]` into the caches `[blocks, block_size, Nkv, D]` at slots `[T]` (integers, block * block_size + offset)."""
    _npu().npu_scatter_pa_kv_cache(
        key.contiguous(),
        value.contiguous(),
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slots,
        cache_mode="Norm",
    )


def causal_mask(device: torch.device) -> Tensor:
    """The compressed mask of SPARSE_CAUSAL and SPARSE_BAND: int8 `[2048, 2048]`, 1 above the diagonal."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu_(1).to(device)


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Fused attention in TND layout: query `[T, N, D]`; options as of `npu_fused_infer_attention_score`. Returns `[T, N, D]`."""
    return _npu().npu_fused_infer_attention_score(query, key, value, input_layout="TND", **options)[0]  # type: ignore[no-any-return]
