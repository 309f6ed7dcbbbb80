# SPDX-License-Identifier: Apache-2.0
"""Attention of vision and audio towers: no cache, no mask, each picture or window a sequence of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.model_executor.models.whisper import WhisperEncoderAttention
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_ascend.attention import kernels

__all__ = ["AscendTowerAttention", "AscendWhisperAttention", "register"]


class AscendTowerAttention(MMEncoderAttention):
    """`MMEncoderAttention` in one NPU kernel for all sequences, whatever their lengths."""

    @classmethod
    def maybe_recompute_cu_seqlens(
        cls,
        attn_backend: AttentionBackendEnum,
        cu_seqlens: np.ndarray,
        hidden_size: int,
        tp_size: int,
        device: torch.device,
        fp8_padded_hidden_size: int | None = None,
    ) -> Tensor:
        """The first token of each sequence `[sequences + 1]`, left on the host: the kernel takes lengths as a list."""
        return torch.from_numpy(cu_seqlens)

    def forward_oot(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: Tensor | None = None,
        sequence_lengths: Tensor | None = None,
    ) -> Tensor:
        """Query `[B, T, N*D]` or `[B, T, N, D]` -> the same shape; sequences are the rows of B, or lie one after another in T as `cu_seqlens` says."""
        ends = _ends(query) if cu_seqlens is None else cu_seqlens[1:].tolist()
        key_ends = _ends(key) if cu_seqlens is None else ends
        output = kernels.attention_of_any_size(
            query.reshape(-1, self.num_heads, self.head_size),
            key.reshape(-1, self.num_kv_heads, self.head_size),
            value.reshape(-1, self.num_kv_heads, self.head_size),
            num_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            scale=self.scale,
            sparse_mode=kernels.SPARSE_NONE,
            actual_seq_lengths=ends,
            actual_seq_lengths_kv=key_ends,
        )
        return output.reshape(query.shape)


class AscendWhisperAttention(AscendTowerAttention, WhisperEncoderAttention):
    """The same for Whisper's encoder, whose class takes one sound `[T, N*D]` as well."""


def _ends(x: Tensor) -> list[int]:
    """Cumulative lengths of the rows of x `[B, T, ...]`."""
    rows, tokens = x.shape[:2]
    return [tokens * (row + 1) for row in range(rows)]


def register() -> None:
    """Replace vLLM's layers."""
    MMEncoderAttention.register_oot(AscendTowerAttention)
    WhisperEncoderAttention.register_oot(AscendWhisperAttention)
