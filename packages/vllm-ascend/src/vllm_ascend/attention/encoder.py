# SPDX-License-Identifier: Apache-2.0
"""Attention of encoders: every token sees the tokens of its own request in both directions, and nothing is cached."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionLayer, AttentionType

from vllm_ascend.attention import kernels
from vllm_ascend.attention.gqa import AscendAttentionBackend, AscendAttentionImpl
from vllm_ascend.attention.step import AscendAttentionMetadata

__all__ = ["AscendEncoderAttentionBackend", "AscendEncoderAttentionImpl"]


class AscendEncoderAttentionBackend(AscendAttentionBackend):
    """Names the parts. The table of backends knows it by its base class's name: which of the two a layer takes, the layer's kind decides."""

    forward_includes_kv_cache_update = True  # so that no update is called: there is no cache

    @staticmethod
    def get_impl_cls() -> type[AscendEncoderAttentionImpl]:
        """The class a layer runs."""
        return AscendEncoderAttentionImpl

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Encoders alone."""
        return attn_type in (AttentionType.ENCODER_ONLY, AttentionType.ENCODER)

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Always so."""
        return True


class AscendEncoderAttentionImpl(AscendAttentionImpl):
    """One layer's attention over the keys and values of the same step. A request's tokens are all in one step: vLLM cuts no prompt of such a model."""

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Nothing: the layer has no cache."""

    def _attend(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        step: AscendAttentionMetadata,
    ) -> Tensor:
        """As the class above, over key and value `[T, Nkv, D]` of this step."""
        return kernels.attention_of_any_size(
            query,
            key[: len(query)],
            value[: len(query)],
            num_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            scale=self.scale,
            actual_seq_lengths=step.query_ends,
            actual_seq_lengths_kv=step.query_ends,
            **self._masking(step.mask, causal=False),
        )
