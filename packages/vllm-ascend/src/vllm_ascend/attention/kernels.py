# SPDX-License-Identifier: Apache-2.0
"""The NPU's kernels of attention and of its cache, each as one function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_ascend.kernels import npu

__all__ = [
    "attention",
    "attention_of_any_size",
    "attention_of_wide_heads",
    "attention_with_mask",
    "attention_with_sinks",
    "cached_head_size",
    "causal_mask",
    "gather_kv",
    "kernel_head_size",
    "latent_attention",
    "merge_attention",
    "prompt_latent_attention",
    "scatter_kv",
    "widened",
]

SPARSE_NONE = 0  # no mask: every query sees every key
SPARSE_CAUSAL = 3  # the causal triangle ends at the last key of each request
SPARSE_BAND = 4  # as before, within a window
MASK_SIZE = 2048  # side of the compressed mask that modes 3 and 4 take, whatever the lengths


def scatter_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write key and value `[T, Nkv, D]` into the caches `[blocks, block_size, Nkv, D]` at slots `[T]`: integers, block * block_size + offset, none of them
    negative or twice."""
    npu().npu_scatter_pa_kv_cache(
        key.contiguous(),
        value.contiguous(),
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slots,
        cache_mode="Norm",
    )


def gather_kv(
    key_cache: Tensor, value_cache: Tensor, block_table: Tensor, lengths: Tensor, starts: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Read parts of requests from the caches `[blocks, block_size, Nkv, D]`, one request after the other.

    Args:
        key_cache, value_cache: may differ in D.
        block_table: int32 `[requests, blocks]`.
        lengths: int32 `[requests]`, tokens to read of each.
        starts: int32 `[requests]`, the first of them; multiples of block_size.
        rows: the sum of `lengths`.

    Returns:
        `[rows, Nkv, D]` of each cache.
    """
    key, value = (cache.new_empty(rows, *cache.shape[2:]) for cache in (key_cache, value_cache))
    npu().npu_gather_pa_kv_cache(key_cache, value_cache, block_table, lengths, key, value, seq_offset=starts)
    return key, value


def causal_mask(device: torch.device) -> Tensor:
    """The compressed mask of SPARSE_CAUSAL and SPARSE_BAND: int8 `[2048, 2048]`, 1 above the diagonal."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu_(1).to(device)


HEAD_SIZES = (64, 128, 192, 256)
"""Widths of heads that `attention` takes in TND layout."""


def kernel_head_size(size: int) -> int:
    """The smallest head size that `attention` takes and that holds `size`; 0 where there is none."""
    return next((taken for taken in HEAD_SIZES if taken >= size), 0)


WIDE_HEAD_SIZE = 512
"""Width of the widest heads that `attention_of_wide_heads` takes."""


WIDE_HEAD_MULTIPLE = 16
"""What their width is a multiple of."""


def _wide_head_size(size: int) -> int:
    """The next multiple that holds `size`."""
    return -(-size // WIDE_HEAD_MULTIPLE) * WIDE_HEAD_MULTIPLE


def cached_head_size(size: int) -> int:
    """The smallest head size that holds `size` and that `attention` takes, or `attention_of_wide_heads` where there is none; 0 beyond 512."""
    wide = _wide_head_size(size)
    return kernel_head_size(size) or (wide if wide <= WIDE_HEAD_SIZE else 0)


def widened(rows: Tensor, size: int) -> Tensor:
    """Heads `[T, N, D]` with zeros up to `size`, which add nothing to a score and give columns of zeros in the result."""
    missing = size - rows.shape[-1]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Fused attention in TND layout. Returns `[T, N, D]`.

    Args:
        query: `[T, N, D]`. The kernel reads contiguous tensors; the query of a fused projection is a view, and is copied here.
        key, value: `[T, Nkv, D]`, copied in the same way; or, with `block_table`, two caches `[blocks, block_size, Nkv * D]`, which must be contiguous.
        options: as of `npu_fused_infer_attention_score`.
    """
    if options.get("block_table") is None:
        key, value = key.contiguous(), value.contiguous()
    out, _ = npu().npu_fused_infer_attention_score(query.contiguous(), key, value, input_layout="TND", **options)
    return out  # type: ignore[no-any-return]


def attention_of_wide_heads(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """Fused attention of requests with equally many query tokens, for heads of up to 512 numbers: in BSND layout, TND takes 256 at most.

    Args:
        query: `[B, S, N, D]`, copied where it is not contiguous.
        keys, values: two caches `[blocks, block_size, Nkv * D]`, which must be contiguous.
        options: as of `npu_fused_infer_attention_score`.

    Returns:
        `[B, S, N, D]`.
    """
    out, _ = npu().npu_fused_infer_attention_score(query.contiguous(), keys, values, input_layout="BSND", **options)
    return out  # type: ignore[no-any-return]


def attention_with_mask(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """Fused attention of sequences of one length, without a cache, where a mask says what a query sees.

    Args:
        query: `[B, N, S, D]`, D at most 512; filled with zeros up to a multiple of 16.
        key, value: `[B, Nkv, S2, D]`.
        hidden: bool `[B, 1, S, S2]`, or 1 for B: True where a query does not see a key. None: each sees all.
        scale: of the scores.

    Returns:
        `[B, N, S, D]`.
    """
    size = query.shape[-1]
    query, key, value = (widened(rows, _wide_head_size(size)).contiguous() for rows in (query, key, value))
    out, _ = npu().npu_fused_infer_attention_score(
        query,
        key,
        value,
        input_layout="BNSD",
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale=scale,
        sparse_mode=SPARSE_NONE,
        atten_mask=None if hidden is None else hidden.contiguous(),
    )
    return out[..., :size]  # type: ignore[no-any-return]


SINK_HEAD_SIZE = 128
"""Width of the heads that `attention_with_sinks` takes."""


def attention_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    *,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    actual_seq_lengths: list[int],
    actual_seq_lengths_kv: list[int],
    **options: Any,
) -> Tensor:
    """`attention` over two caches, with a learned score for each head that has neither key nor value.

    Args:
        query: `[T, N, 128]`.
        key, value: caches `[blocks, block_size, Nkv * 128]`.
        sinks: `[N]`, bfloat16.
        num_heads, num_key_value_heads, scale, actual_seq_lengths, actual_seq_lengths_kv: as of `npu_fused_infer_attention_score`.
        options: those whose names both versions of the operator share.

    Returns:
        `[T, N, 128]`.
    """
    out, _ = npu().npu_fused_infer_attention_score_v2(
        query.contiguous(),
        key,
        value,
        learnable_sink=sinks,
        input_layout="TND",
        num_query_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        softmax_scale=scale,
        actual_seq_qlen=actual_seq_lengths,
        actual_seq_kvlen=actual_seq_lengths_kv,
        **options,
    )
    return out  # type: ignore[no-any-return]


def attention_of_any_size(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`attention` for heads of any size up to 256: they are filled with zeros up to the next size that the kernel takes, and the result is cut.

    Raises:
        ValueError: larger heads.
    """
    size = query.shape[-1]
    taken = kernel_head_size(size)
    if not taken:
        raise ValueError(
            f"heads are {size} wide: the attention kernel takes {', '.join(map(str, HEAD_SIZES))}, and so smaller ones"
        )
    query, key, value = (widened(rows, taken) for rows in (query, key, value))
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
    out, _ = npu().npu_fused_infer_attention_score_v2(
        query.contiguous(),
        shared,
        shared,
        query_rope=query_rope.contiguous(),
        key_rope=key_rope.unsqueeze(1),
        input_layout="TND",
        num_query_heads=query.shape[1],
        num_key_value_heads=1,
        softmax_scale=scale,
        block_table=block_table,
        block_size=latents.shape[1],
        actual_seq_qlen=query_ends,
        actual_seq_kvlen=kv_lengths,
        sparse_mode=SPARSE_NONE if mask is None else SPARSE_CAUSAL,
        atten_mask=mask,
    )
    return out  # type: ignore[no-any-return]


def prompt_latent_attention(
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    value: Tensor,
    *,
    query_ends: list[int],
    kv_ends: list[int],
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Latent attention in the plain form: keys and values that were projected up from latents, with rotary parts apart.

    Args:
        query: `[T, N, 128]` and its rotary part `[T, N, 64]`.
        key: `[S, N, 128]` and its rotary part `[S, 1, 64]`, which all heads share.
        value: `[S, N, 128]`.
        query_ends: cumulative query lengths of the requests.
        kv_ends: cumulative lengths of their keys.
        mask: the compressed causal mask, for requests whose last key is their last query token's own; None where every token sees every key.
        scale: of the scores.

    Returns:
        `[T, N, 128]`, and the log-sum-exp of the scores, float32 `[T, N, 1]`.
    """
    heads = value.shape[1]
    out, lse = npu().npu_fused_infer_attention_score_v2(
        query[0].contiguous(),
        key[0].contiguous(),
        value.contiguous(),
        query_rope=query[1].contiguous(),
        key_rope=key[1].expand(-1, heads, -1).contiguous(),
        input_layout="TND",
        num_query_heads=heads,
        num_key_value_heads=heads,
        softmax_scale=scale,
        actual_seq_qlen=query_ends,
        actual_seq_kvlen=kv_ends,
        sparse_mode=SPARSE_NONE if mask is None else SPARSE_CAUSAL,
        atten_mask=mask,
        return_softmax_lse=True,
    )
    return out, lse


def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of all parts, from each part's result `[T, N, D]` and its log-sum-exp `[T, N, 1]`, float32, contiguous."""
    rows = [out.view(-1, out.shape[-1]) for out in outs]
    out, lse = npu().npu_attention_update([lse.view(-1) for lse in lses], rows, 1)
    return out.view(outs[0].shape), lse.view(lses[0].shape)
