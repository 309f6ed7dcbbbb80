# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of decoders over what an encoder said of a request's input (Whisper). vLLM derives its own classes from these.

Those call the update of the cache themselves, in the step that has the encoder's output, and give the slots of its tokens with the metadata.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType

from vllm_ascend.attention.gqa import AscendAttentionBackend, AscendAttentionImpl

__all__ = ["AscendCrossAttentionBackend", "AscendCrossAttentionImpl"]


class AscendCrossAttentionBackend(AscendAttentionBackend):
    """Names the parts."""

    @staticmethod
    def get_impl_cls() -> type[AscendCrossAttentionImpl]:
        """The class from which vLLM derives the one that a layer runs."""
        return AscendCrossAttentionImpl

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Cross-attention alone."""
        return attn_type == AttentionType.ENCODER_DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Always so."""
        return True


class AscendCrossAttentionImpl(AscendAttentionImpl):
    """One layer's attention; a query token sees all keys of its request."""

    backend = AscendCrossAttentionBackend

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the encoder's key and value `[S, Nkv, D]`, S in all requests that begin in this step; each has a slot."""
        self._write(key[: len(slot_mapping)], value[: len(slot_mapping)], kv_cache, slot_mapping)
