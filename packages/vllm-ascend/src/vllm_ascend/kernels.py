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
    "causal_mask",
    "latent_attention",
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


def attention_of_any_size(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`attention` for heads of any size up to 256: they are filled with zeros up to the next size that the kernel takes, and the result is cut."""
    size = query.shape[-1]
    wider = next(taken for taken in (64, 128, 192, 256) if taken >= size) - size
    query, key, value = (torch.nn.functional.pad(x, (0, wider)).contiguous() for x in (query, key, value))
    return attention(query, key, value, **options)[..., :size]


def latent_attention(
    query: Tensor,
    query_rope: Tensor,
    latents: Tensor,
    key_rope: Tensor,
    *,
    query_ends: list[int],
    kv_lengths: list[int],
    block_table: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention in the absorbed form: all heads read one paged key, `[latent, rope]`, whose latent is the value too.

    Args:
        query: `[T, N, 512]`; N a power of two, at most 128.
        query_rope: `[T, N, 64]`.
        latents: `[blocks, block_size, 512]`; block_size 16 or 128.
        key_rope: `[blocks, block_size, 64]`.
        query_ends: cumulative query lengths, at most 16 tokens each.
        kv_lengths: keys of each request.
        block_table: int32 `[requests, blocks]`.
        mask: the compressed causal mask; None where each request has one query token.
        scale: of the scores.

    Returns:
        `[T, N, 512]`.
    """
    shared = latents.unsqueeze(1)  # [blocks, heads, block_size, 512]
    return attention(
        query,
        shared,
        shared,
        query_rope=query_rope,
        key_rope=key_rope.unsqueeze(1),
        num_heads=query.shape[1],
        num_key_value_heads=1,
        scale=scale,
        block_table=block_table,
        block_size=latents.shape[1],
        actual_seq_lengths=query_ends,
        actual_seq_lengths_kv=kv_lengths,
        sparse_mode=SPARSE_NONE if mask is None else SPARSE_CAUSAL,
        atten_mask=mask,
    )
