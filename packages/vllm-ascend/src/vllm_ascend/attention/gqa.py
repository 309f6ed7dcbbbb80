# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged KV cache, multi-head or grouped-query, causal or windowed; and without a cache for encoders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend import kernels

__all__ = ["AscendAttentionBackend", "AscendAttentionImpl", "AscendAttentionMetadata", "AscendAttentionMetadataBuilder"]

BLOCK_SIZE = 128


class AscendAttentionBackend(AttentionBackend):
    """Names the parts, and how the KV cache lies in memory: one tensor of keys and one of values a layer."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """As registered in vLLM's table of backends."""
        return "ASCEND_ATTN"

    @staticmethod
    def get_impl_cls() -> type[AscendAttentionImpl]:
        """The class a layer runs."""
        return AscendAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[AscendAttentionMetadataBuilder]:
        """The class that prepares a step."""
        return AscendAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """The attention kernel takes blocks of a multiple of 16 tokens."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """128 tokens: what the kernel's documentation asks of prefill; vLLM's default of 16 serves decode alone."""
        return BLOCK_SIZE

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Two head slots, keys and values, each `num_kv_heads * head_size` wide."""
        if spec.state_content_bytes is not None:
            return spec
        if spec.head_size != spec.head_size_v:
            raise ValueError(
                f"vllm-ascend attention needs equal key and value head sizes, got {spec.head_size} and {spec.head_size_v}"
            )
        width = spec.num_kv_heads * spec.head_size * get_dtype_size(spec.dtype)
        return replace(spec, num_head_slots=2, state_content_bytes=width)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head slots outside blocks: `cache[:, 0]` and `cache[:, 1]` are contiguous."""
        return (KVCacheLayout.LHBNC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders, and encoders without a cache."""
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_ONLY, AttentionType.ENCODER)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """By the kernel's band mask."""
        return True


@dataclass(slots=True)
class AscendAttentionMetadata(AttentionMetadata):
    """One step's lengths, for all layers of a KV-cache group.

    Attributes:
        num_tokens: query tokens T.
        query_ends: cumulative query lengths, last one T.
        kv_lengths: keys of each request.
        block_table: int32 `[requests, blocks]`.
        mask: the compressed causal mask.
        causal: whether a query sees later keys not at all.
    """

    num_tokens: int
    query_ends: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    mask: Tensor
    causal: bool


class AscendAttentionMetadataBuilder(AttentionMetadataBuilder[AscendAttentionMetadata]):
    """Turns vLLM's description of a step into kernel arguments."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """Copy the causal mask to the device."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.mask = kernels.causal_mask(device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AscendAttentionMetadata:
        """One step."""
        step = common_attn_metadata
        if not isinstance(step.causal, bool):
            raise ValueError("vllm-ascend attention takes one causal flag for all requests of a step")
        lengths = step.seq_lens_cpu_upper_bound
        if lengths is None:
            lengths = step.seq_lens.cpu()
        return AscendAttentionMetadata(
            num_tokens=step.num_actual_tokens,
            query_ends=step.query_start_loc_cpu[1 : step.num_reqs + 1].tolist(),
            kv_lengths=lengths[: step.num_reqs].tolist(),
            block_table=step.block_table_tensor[: step.num_reqs],
            mask=self.mask,
            causal=step.causal,
        )


class AscendAttentionImpl(AttentionImpl[AscendAttentionMetadata]):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """Store the sizes and the masking.

        Raises:
            ValueError: an argument that the kernel does not have, of a model whose configuration did not show it at the start.
        """
        for name, value in (("alibi_slopes", alibi_slopes), ("logits_soft_cap", logits_soft_cap), *extra.items()):
            if value:
                raise ValueError(f"the NPU attention kernel has no {name} (got {value!r})")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's cache `[blocks, 2, block_size, Nkv*D]` as keys and values, each `[blocks, block_size, Nkv*D]` and contiguous."""
        return kv_cache[:, 0], kv_cache[:, 1]

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write this step's key and value `[T, Nkv, D]`. Padding tokens have no slot and are cut off; a step without requests has none."""
        if get_forward_context().attn_metadata is None:  # its slots are all -1, which the kernel does not take
            return
        tokens = slot_mapping.shape[0]
        shape = (kv_cache.shape[0], kv_cache.shape[2], self.num_kv_heads, self.head_size)
        keys, values = self._caches(kv_cache)
        kernels.scatter_kv(key[:tokens], value[:tokens], keys.view(shape), values.view(shape), slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: AscendAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Query `[T, N, D]` -> output `[T, N, D]`, written and returned. Without metadata (profiling) the output is zero."""
        step = attn_metadata
        if step is None:
            return output.zero_()
        tokens = step.num_tokens
        options: dict[str, Any] = {
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "scale": self.scale,
        }
        if self.attn_type == AttentionType.DECODER:
            keys, values = self._caches(kv_cache)
            options |= {
                "block_table": step.block_table,
                "block_size": kv_cache.shape[2],
                "actual_seq_lengths_kv": step.kv_lengths,
            }
        else:
            keys, values = key[:tokens], value[:tokens]
            options["actual_seq_lengths_kv"] = step.query_ends
        options |= self._masking(step)
        result = kernels.attention(query[:tokens], keys, values, actual_seq_lengths=step.query_ends, **options)
        if tokens == output.shape[0]:
            output.set_(result.view(output.shape))  # type: ignore[call-overload]  # the tensor takes the result's memory: no copy
            return output
        output[:tokens].copy_(result.view(output[:tokens].shape))
        return output

    def _masking(self, step: AscendAttentionMetadata) -> dict[str, Any]:
        causal = step.causal and self.attn_type == AttentionType.DECODER
        if self.sliding_window is not None:
            # The band of mode 4: a query sees `pre_tokens` keys before its own and `next_tokens` after it.
            reach = self.sliding_window - 1
            return {
                "sparse_mode": kernels.SPARSE_BAND,
                "atten_mask": step.mask,
                "pre_tokens": reach,
                "next_tokens": 0 if causal else reach,
            }
        if causal:
            return {"sparse_mode": kernels.SPARSE_CAUSAL, "atten_mask": step.mask}
        return {"sparse_mode": kernels.SPARSE_NONE}
