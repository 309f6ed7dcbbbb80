# SPDX-License-Identifier: Apache-2.0
"""Attention composed of single operators over blocks that hold keys beside their values: pictures that are seen both ways, in models whose layers differ (Gemma 4)."""

from __future__ import annotations

from vllm_ascend.attention.composed import (
    AscendComposedAttentionBackend,
    AscendComposedAttentionImpl,
    ComposedMetadataBuilder,
)
from vllm_ascend.attention.paired import (
    AscendPairedAttentionBackend,
    AscendPairedAttentionImpl,
    PairedMetadataBuilder,
)

__all__ = ["AscendPairedComposedAttentionBackend", "AscendPairedComposedAttentionImpl"]


class AscendPairedComposedAttentionBackend(AscendComposedAttentionBackend, AscendPairedAttentionBackend):
    """Names the parts: the first class says what is computed, the second how the cache lies in memory."""

    @staticmethod
    def get_impl_cls() -> type[AscendPairedComposedAttentionImpl]:
        """The class a layer runs."""
        return AscendPairedComposedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PairedComposedMetadataBuilder]:
        """The class that prepares a step."""
        return PairedComposedMetadataBuilder


class PairedComposedMetadataBuilder(ComposedMetadataBuilder, PairedMetadataBuilder):
    """Numbers blocks for the kernel as the second class does; single operators read them by vLLM's numbers."""


class AscendPairedComposedAttentionImpl(AscendComposedAttentionImpl, AscendPairedAttentionImpl):
    """One layer's attention: the first class computes it, the second says where keys and values lie."""

    backend = AscendPairedComposedAttentionBackend
