# SPDX-License-Identifier: Apache-2.0
"""Attention with heads of more than 256 numbers. The layout in which the kernel takes them has a batch dimension: all requests of a call have equally many query tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_ascend.attention import kernels
from vllm_ascend.attention.step import AscendAttentionMetadata, groups

__all__ = ["attend"]


def attend(query: Tensor, keys: Tensor, values: Tensor, step: AscendAttentionMetadata, **options: Any) -> Tensor:
    """Attention of a step: one call for consecutive requests with equally many query tokens, such as those that decode.

    Args:
        query: `[T, N, D]`.
        keys, values: two caches `[blocks, block_size, Nkv * D]`.
        step: the requests.
        options: of the kernel, but for what says which requests and which mask.

    Returns:
        `[T, N, D]`.
    """
    outs = []
    for first, last, rows in groups(step.query_ends, lambda _, tokens: tokens):
        if rows.start == rows.stop:
            continue
        part = query[rows].reshape(last - first, -1, *query.shape[1:])
        # One query token, the last of its request, sees all keys.
        masked = step.causal and part.shape[1] > 1
        mask = {"sparse_mode": kernels.SPARSE_CAUSAL, "atten_mask": step.mask}
        out = kernels.attention_of_wide_heads(
            part,
            keys,
            values,
            block_table=step.block_table[first:last],
            actual_seq_lengths_kv=step.kv_lengths[first:last],
            **(mask if masked else {"sparse_mode": kernels.SPARSE_NONE}),
            **options,
        )
        outs.append(out.flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
