# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache whose blocks hold keys and values side by side, for models that have layers with a recurrent state as well, or layers whose heads differ.

There vLLM lets a layer's state, or its keys and values of another shape, lie in the memory of another layer's keys and values, block for block, so that every block must be one piece: the keys of its tokens, then
their values (layout LBHNC). The kernel takes keys and values as two contiguous tensors of blocks with one table for both. Both are views of the whole: the blocks of
the values' tensor begin one half block later than those of the keys', and block b is number 2b of either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend.attention.gqa import AscendAttentionBackend, AscendAttentionImpl, AscendAttentionMetadataBuilder
from vllm_ascend.attention.step import AscendAttentionMetadata

__all__ = ["AscendPairedAttentionBackend", "AscendPairedAttentionImpl"]


class AscendPairedAttentionBackend(AscendAttentionBackend):
    """The form for blocks that are one piece each."""

    @staticmethod
    def get_impl_cls() -> type[AscendPairedAttentionImpl]:
        """The class a layer runs."""
        return AscendPairedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PairedMetadataBuilder]:
        """The class that prepares a step."""
        return PairedMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Keys and values within blocks."""
        return (KVCacheLayout.LBHNC,)


class PairedMetadataBuilder(AscendAttentionMetadataBuilder):
    """Numbers blocks as `AscendPairedAttentionImpl` views them."""

    kernel_tensor_blocks = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the class above. ValueError likewise."""
        super().__init__(*args, **kwargs)
        self._table: Tensor | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AscendAttentionMetadata:
        """One step."""
        step = super().build(common_prefix_len, common_attn_metadata, fast_build)
        step.block_table = self._numbered(step.block_table)
        return step

    def _numbered(self, table: Tensor) -> Tensor:
        """Twice the table, always in the same memory: a graph reads it there."""
        if self._table is None or self._table.shape[0] < len(table) or self._table.shape[1] != table.shape[1]:
            rows = max(self.vllm_config.scheduler_config.max_num_seqs, len(table))
            self._table = table.new_zeros(rows, table.shape[1])
        return torch.mul(table, 2, out=self._table[: len(table)])


class AscendPairedAttentionImpl(AscendAttentionImpl):
    """One layer's attention."""

    backend = AscendPairedAttentionBackend

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's cache `[blocks, 2, block_size, Nkv*D]`, contiguous, as keys and values, each `[2 blocks - 1, block_size, Nkv*D]`."""
        halves = kv_cache.flatten(0, 1)
        return halves[:-1], halves[1:]

    def pieces(self, kv_cache: Tensor) -> tuple[Tensor, ...]:
        """One: a block is a piece of its own."""
        return (kv_cache,)

    def _write(self, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """Keys and values into slots that are counted over all half blocks."""
        size = kv_cache.shape[2]
        super()._write(key, value, kv_cache, slots + slots.div(size, rounding_mode="floor") * size)
