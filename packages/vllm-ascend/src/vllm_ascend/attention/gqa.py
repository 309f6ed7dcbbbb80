# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged KV cache, multi-head or grouped-query, causal or windowed. `encoder.py` has that of encoders, without a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, EncoderOnlyAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend import graphs
from vllm_ascend.attention import kernels, wide
from vllm_ascend.attention.limits import BLOCK_SIZES, HEAD_SIZES, cached_head_size, check_cache
from vllm_ascend.attention.step import AscendAttentionMetadata, describe, tokens_of_step

__all__ = ["AscendAttentionBackend", "AscendAttentionImpl", "AscendAttentionMetadataBuilder"]


class AscendAttentionBackend(AttentionBackend):
    """Names the parts, and how the KV cache lies in memory: one tensor of keys and one of values a layer."""

    supported_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012
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

    @classmethod
    def kernel_size(cls, head_size: int) -> int:
        """The size of the kernel's heads, to which those of a model are padded; 0 where it takes none so large."""
        return cached_head_size(head_size)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """What the attention kernel takes of requests with several query tokens. Larger blocks cannot be cut: keys and values lie apart."""
        return list(BLOCK_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The smallest that the kernel takes of prompts; vLLM's default of 16 serves decode alone."""
        return BLOCK_SIZES[0]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Two head slots, keys and values, each `num_kv_heads` heads wide, of the size to which the kernel's heads are padded."""
        if spec.state_content_bytes is not None:
            return spec
        if spec.head_size != spec.head_size_v:
            raise ValueError(
                f"vllm-ascend attention needs equal key and value head sizes, got {spec.head_size} and {spec.head_size_v}"
            )
        width = spec.num_kv_heads * cls.kernel_size(spec.head_size) * get_dtype_size(spec.dtype)
        return replace(spec, num_head_slots=2, state_content_bytes=width)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head slots outside blocks: `cache[:, 0]` and `cache[:, 1]` are contiguous."""
        return (KVCacheLayout.LHBNC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders: the platform gives encoders a backend of their own."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """By the kernel's band mask."""
        return True


class AscendAttentionMetadataBuilder(AttentionMetadataBuilder[AscendAttentionMetadata]):
    """Turns vLLM's description of a step into kernel arguments.

    Attributes:
        kernel_tensor_blocks: blocks of the kernel's tensor of keys for each block of the cache.
    """

    kernel_tensor_blocks: ClassVar[int] = 1

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """Copy the causal mask to the device.

        Raises:
            ValueError: the cache is too large for the kernel.
        """
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.mask = kernels.causal_mask(device)
        if isinstance(kv_cache_spec, EncoderOnlyAttentionSpec):
            return
        if isinstance(kv_cache_spec, AttentionSpec) and (blocks := vllm_config.cache_config.num_gpu_blocks):
            # `customize_spec` wrote there the bytes of a token's keys.
            width = kv_cache_spec.state_content_size_bytes // get_dtype_size(kv_cache_spec.dtype)
            # Where vLLM has cut blocks into smaller ones for the kernel, `num_gpu_blocks` counts the larger ones.
            tokens = max(kv_cache_spec.block_size, vllm_config.cache_config.block_size)
            check_cache(blocks, tokens, width * self.kernel_tensor_blocks)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AscendAttentionMetadata:
        """One step."""
        return describe(common_attn_metadata, self.mask)


class AscendAttentionImpl(AttentionImpl[AscendAttentionMetadata]):
    """One layer's attention.

    Attributes:
        backend: the class that says how this one's cache lies in memory.
        takes: arguments for which this class has a form of attention, of those that others refuse.
    """

    backend: ClassVar[type[AscendAttentionBackend]] = AscendAttentionBackend
    takes: ClassVar[frozenset[str]] = frozenset()

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
            if name not in self.takes and (isinstance(value, Tensor) or value):
                raise ValueError(f"the NPU attention kernel has no {name} (got {value!r})")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.alibi_slopes, self.logits_soft_cap = alibi_slopes, logits_soft_cap
        self.kernel_size = self.backend.kernel_size(head_size)
        self.is_wide = self.kernel_size > HEAD_SIZES[-1]
        if not self.kernel_size or (self.is_wide and sliding_window is not None):
            within = "" if sliding_window is None else f" with a sliding window ({sliding_window})"
            raise ValueError(f"the NPU attention kernel takes no heads of {head_size} numbers{within}")
        self.num_kv_heads = num_kv_heads or num_heads
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's cache `[blocks, 2, block_size, Nkv*D]`, D being the kernel's head size, as keys and values, each `[blocks, block_size, Nkv*D]` and contiguous."""
        return kv_cache[:, 0], kv_cache[:, 1]

    def pieces(self, kv_cache: Tensor) -> tuple[Tensor, ...]:
        """The layer's cache as contiguous tensors, of which the first dimension counts blocks: what a copy of a block is made of."""
        return self._caches(kv_cache)

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write this step's key and value `[T, Nkv, D]`. Padding tokens have no slot, and a step without requests has no tokens to write."""
        tokens = tokens_of_step()
        if tokens:
            self._write(key[:tokens], value[:tokens], kv_cache, slot_mapping[:tokens])

    def _write(self, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        shape = (-1, kv_cache.shape[2], self.num_kv_heads, self.kernel_size)
        keys, values = (cache.view(shape) for cache in self._caches(kv_cache))
        key, value = (kernels.widened(rows, self.kernel_size) for rows in (key, value))
        kernels.scatter_kv(key, value, keys, values, slots)

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
        tokens = step.num_actual_tokens
        result = self._attend(layer, query[:tokens], key, value, kv_cache, step)
        if tokens == output.shape[0] and result.is_contiguous():
            output.set_(result.view(output.shape))  # type: ignore[call-overload]  # the tensor takes the result's memory: no copy
        else:
            output[:tokens].copy_(result.reshape(output[:tokens].shape))
        return output

    def _attend(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        step: AscendAttentionMetadata,
    ) -> Tensor:
        """Query `[T, N, D]` of the step's T tokens, without padding -> `[T, N, D]` in its type; key and value are those of `forward`."""
        keys, values = self._caches(kv_cache)
        query = kernels.widened(query, self.kernel_size)
        options = {
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "scale": self.scale,
            "block_size": kv_cache.shape[2],
        }
        graphs.note_attention(layer)
        if self.is_wide:
            result = wide.attend(query, keys, values, step, **options)
        else:
            result = self._kernel(
                query,
                keys,
                values,
                block_table=step.block_table,
                actual_seq_lengths=step.query_ends,
                actual_seq_lengths_kv=step.kv_lengths,
                **options,
                **self._masking(step.mask, causal=step.causal),
            )
        return result if self.kernel_size == self.head_size else result[..., : self.head_size]

    def _kernel(self, query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        return kernels.attention(query, keys, values, **options)

    def _masking(self, mask: Tensor, *, causal: bool) -> dict[str, Any]:
        """The kernel's mask: a band within the window, the causal triangle, or none."""
        if self.sliding_window is not None:
            # The band of mode 4: a query sees `pre_tokens` keys before its own and `next_tokens` after it.
            reach = self.sliding_window - 1
            return {
                "sparse_mode": kernels.SPARSE_BAND,
                "atten_mask": mask,
                "pre_tokens": reach,
                "next_tokens": 0 if causal else reach,
            }
        if causal:
            return {"sparse_mode": kernels.SPARSE_CAUSAL, "atten_mask": mask}
        return {"sparse_mode": kernels.SPARSE_NONE}
