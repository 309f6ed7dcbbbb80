# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (DeepSeek's MLA) over a paged cache of latents.

vLLM's `MLAAttention` folds W_UK into the query and applies W_UV to the result (the absorbed form), so that all heads attend to one latent key of
512 + 64 numbers a token, whose first 512 are the value as well. Here every token goes that way, prompts too: the kernel takes at most 16 query tokens
a request, and a longer piece of a prompt is given to it as several requests over the same blocks, each ending a tile of 16 tokens later.
Prefill, chunks, cached prefixes, decoding and any mixture of them are then one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    CommonAttentionMetadata,
    MLAAttentionImpl,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend import kernels
from vllm_ascend.attention.gqa import AscendAttentionMetadata, AscendAttentionMetadataBuilder

__all__ = [
    "AscendMLABackend",
    "AscendMLAImpl",
    "AscendMLAMetadata",
    "AscendMLAMetadataBuilder",
    "NoMLAPrefill",
    "spare_workspace",
    "tiles",
]

BLOCK_SIZES = (128, 16)  # what the kernel takes beside 512 + 64 columns
TILE = 16  # query tokens that the kernel takes of a request


class AscendMLABackend(AttentionBackend):
    """Names the parts, and how the KV cache lies in memory."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """As registered in vLLM's table of backends."""
        return "ASCEND_MLA"

    @staticmethod
    def get_impl_cls() -> type[AscendMLAImpl]:
        """The class a layer runs."""
        return AscendMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AscendMLAMetadataBuilder]:
        """The class that prepares a step."""
        return AscendMLAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """128 or 16 tokens; vLLM cuts larger blocks into these."""
        return list(BLOCK_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """128 tokens, as for other attention."""
        return BLOCK_SIZES[0]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layers outside: a layer's cache is one piece of memory."""
        return (KVCacheLayout.LHBNC,)

    @classmethod
    def is_mla(cls) -> bool:
        """For vLLM's `MLAAttention`."""
        return True


class NoMLAPrefill(MLAPrefillBackend):
    """What vLLM's layer insists to construct for prompts, and what is never asked: they go through `AscendMLAImpl.forward_mqa`."""

    @staticmethod
    def get_name() -> str:
        """For the log."""
        return "ASCEND_MLA"

    def run_prefill_new_tokens(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not called."""
        raise NotImplementedError("ASCEND_MLA computes prompts in the absorbed form")

    def run_prefill_context_chunk(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not called."""
        raise NotImplementedError("ASCEND_MLA computes prompts in the absorbed form")


@dataclass(slots=True)
class AscendMLAMetadata(AscendAttentionMetadata):
    """One step, whose requests are tiles. What vLLM's layer reads of it says that every token is a decoded one."""

    num_prefills: ClassVar[int] = 0

    @property
    def num_actual_tokens(self) -> int:
        """Query tokens T."""
        return self.num_tokens

    @property
    def num_decode_tokens(self) -> int:
        """All of them."""
        return self.num_tokens

    @property
    def num_decodes(self) -> int:
        """One a tile."""
        return len(self.query_ends)

    @property
    def decode(self) -> AscendMLAMetadata:
        """What the layer wants to be there for decoded tokens."""
        return self


def tiles(query_ends: list[int], kv_lengths: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Cut requests into pieces of at most `TILE` query tokens, each of which ends where its last token's keys end.

    Args:
        query_ends: cumulative query lengths of the requests.
        kv_lengths: keys of each request, its new tokens among them.

    Returns:
        Of each piece its request, the cumulative query length and the keys.
    """
    requests, ends, keys = [], [], []
    begin = 0
    for request, (end, length) in enumerate(zip(query_ends, kv_lengths, strict=True)):
        for cut in [*range(begin + TILE, end, TILE), end]:
            requests.append(request)
            ends.append(cut)
            keys.append(length - (end - cut))
        begin = end
    return requests, ends, keys


class AscendMLAMetadataBuilder(AscendAttentionMetadataBuilder):
    """Turns vLLM's description of a step into kernel arguments."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AscendMLAMetadata:
        """One step."""
        step = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not step.causal:
            raise ValueError("multi-head latent attention on an NPU is causal, got causal=False")
        requests, ends, keys = tiles(step.query_ends, step.kv_lengths)
        block_table = step.block_table
        if len(requests) > len(block_table):
            block_table = block_table[torch.tensor(requests, device=self.device)]
        return AscendMLAMetadata(
            num_tokens=step.num_tokens,
            query_ends=ends,
            kv_lengths=keys,
            block_table=block_table,
            mask=step.mask,
            causal=True,
        )


class AscendMLAImpl(MLAAttentionImpl[AscendMLAMetadata]):
    """One layer's attention. The kernel's limits are checked with the options of a run, in `attention/limits.py`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        *,
        kv_lora_rank: int,
        **dimensions: Any,
    ) -> None:
        """Store the sizes. `dimensions` are the widths of the projections, which vLLM's layer computes.

        Raises:
            ValueError: an argument that the kernel does not have, of a model whose configuration did not show it at the start.
        """
        for name, value in (("alibi_slopes", alibi_slopes), ("sliding_window", sliding_window), ("logits_soft_cap", logits_soft_cap)):  # fmt: skip
            if value:
                raise ValueError(f"multi-head latent attention on an NPU has no {name} (got {value!r})")
        self.num_heads, self.scale = num_heads, scale
        self.kv_lora_rank = kv_lora_rank
        self.kv_cache_dtype = kv_cache_dtype

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's memory, `[blocks, block_size, 512 + 64]` to vLLM, as latents `[blocks, block_size, 512]` and, after all of them, rotated
        keys `[blocks, block_size, 64]`: the kernel wants each of them contiguous."""
        blocks, block_size, _ = kv_cache.shape
        memory, cut = kv_cache.view(-1), blocks * block_size * self.kv_lora_rank
        return memory[:cut].view(blocks, block_size, -1), memory[cut:].view(blocks, block_size, -1)

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Write this step's latents `[T, 512]` and rotated keys `[T, 1, 64]`. Padding tokens have no slot and are cut off; a step without
        requests has none."""
        if get_forward_context().attn_metadata is None:  # its slots are all -1, which the kernel does not take
            return
        tokens = slot_mapping.shape[0]
        latents, keys = self._caches(kv_cache)
        kernels.scatter_kv(
            kv_c_normed[:tokens].unsqueeze(1), k_pe[:tokens], latents.unsqueeze(2), keys.unsqueeze(2), slot_mapping
        )

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: AscendMLAMetadata,
        layer: AttentionLayer,
    ) -> tuple[Tensor, None]:
        """Absorbed query `[T, N, 512]` and rotated query `[T, N, 64]` -> latent output `[T, N, 512]`."""
        assert isinstance(q, tuple)  # one tensor is for quantised caches and context parallelism
        query, query_rope = q
        latents, keys = self._caches(kv_c_and_k_pe_cache)
        step = attn_metadata
        out = kernels.latent_attention(
            query,
            query_rope.contiguous(),
            latents,
            keys,
            query_ends=step.query_ends,
            kv_lengths=step.kv_lengths,
            block_table=step.block_table,
            mask=None if step.num_decodes == step.num_tokens else step.mask,
            scale=self.scale,
        )
        return out, None


def spare_workspace(model: nn.Module) -> None:
    """Let vLLM's profiling run set aside no memory for keys and values projected up from cached latents: here they never are."""
    for layer in model.modules():
        if isinstance(layer, MLAAttention):
            layer._chunked_prefill_workspace_size = 0
