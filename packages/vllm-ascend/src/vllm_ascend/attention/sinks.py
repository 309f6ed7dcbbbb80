# SPDX-License-Identifier: Apache-2.0
"""Attention with sinks: each head has one score more, without a key or a value, that takes part of the softmax (GPT-OSS)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vllm_ascend.attention import kernels
from vllm_ascend.attention.gqa import AscendAttentionBackend, AscendAttentionImpl

__all__ = ["AscendSinkAttentionBackend", "AscendSinkAttentionImpl"]


class AscendSinkAttentionBackend(AscendAttentionBackend):
    """Names the parts. The kernel with sinks takes heads of 128 numbers, to which smaller ones are padded."""

    @staticmethod
    def get_impl_cls() -> type[AscendSinkAttentionImpl]:
        """The class a layer runs."""
        return AscendSinkAttentionImpl

    @classmethod
    def kernel_size(cls, head_size: int) -> int:
        """128, or 0 for larger heads."""
        return kernels.SINK_HEAD_SIZE if head_size <= kernels.SINK_HEAD_SIZE else 0

    @classmethod
    def supports_sink(cls) -> bool:
        """Always so."""
        return True


class AscendSinkAttentionImpl(AscendAttentionImpl):
    """One layer's attention, with a sink for each query head of this rank."""

    backend = AscendSinkAttentionBackend
    takes = frozenset({"sinks"})
    sinks: Tensor

    def __init__(self, *args: Any, sinks: Tensor, **kwargs: Any) -> None:
        """Keep the model's own parameter `[N]`, which it loads later. ValueError as of the class above."""
        super().__init__(*args, **kwargs)
        self.sinks = sinks

    def _kernel(self, query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        return kernels.attention_with_sinks(query, keys, values, self.sinks, **options)
