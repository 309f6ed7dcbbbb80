# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (DeepSeek's MLA) over a paged cache of latents.

Requests of at most 16 new tokens, and longer ones while that takes fewer operations (`mla_step.Forms`), take the absorbed form: vLLM's `MLAAttention` folds
W_UK into the query and applies W_UV to the result, so that all heads attend to one latent key of 512 + 64 numbers a token, whose first 512 are the value as
well; of a request the kernel takes 16 tokens at a time. Other ones, prompts and long chunks of them, take the plain form: keys and values of 128 numbers a
head are projected up from the latents, of new tokens at once, and of cached ones in chunks that are merged by their log-sum-exp. For a pair of a token and
a key that is 640 instead of 2,176 operations a head, for which each cached key is projected up once for a step instead of being read as it is. A model with
wider heads than 128 takes the absorbed form for all tokens.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.v1.attention.backend import AttentionBackend, AttentionLayer, MLAAttentionImpl, MultipleOf
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend import graphs
from vllm_ascend.attention import kernels
from vllm_ascend.attention.limits import LATENT_BLOCK_SIZE, PLAIN_SIZE
from vllm_ascend.attention.mla_step import AscendMLAMetadata, AscendMLAMetadataBuilder, ContextChunk
from vllm_ascend.attention.step import tokens_of_step

__all__ = ["AscendMLABackend", "AscendMLAImpl", "NoMLAPrefill", "reserve_workspace"]


class AscendMLABackend(AttentionBackend):
    """Names the parts, and how the KV cache lies in memory."""

    supported_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012

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
        """128 tokens; vLLM cuts larger blocks into these."""
        return [LATENT_BLOCK_SIZE]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """128 tokens, as for other attention."""
        return LATENT_BLOCK_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layers outside: a layer's cache is one piece of memory."""
        return (KVCacheLayout.LHBNC,)

    @classmethod
    def is_mla(cls) -> bool:
        """For vLLM's `MLAAttention`."""
        return True


class NoMLAPrefill(MLAPrefillBackend):
    """What vLLM's layer insists to construct for prompts, and what is never asked: `AscendMLAImpl.forward_mha` calls the kernels itself."""

    @staticmethod
    def get_name() -> str:
        """For the log."""
        return "ASCEND_MLA"

    def run_prefill_new_tokens(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not called."""
        raise NotImplementedError("ASCEND_MLA computes prompts in AscendMLAImpl.forward_mha")

    def run_prefill_context_chunk(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not called."""
        raise NotImplementedError("ASCEND_MLA computes prompts in AscendMLAImpl.forward_mha")


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
        qk_nope_head_dim: int,
        v_head_dim: int,
        kv_b_proj: nn.Module,
        **dimensions: Any,
    ) -> None:
        """Store the sizes, and the projection from latents to keys and values. `dimensions` are further widths, which vLLM's layer computes.

        Raises:
            ValueError: an argument that the kernel does not have, of a model whose configuration did not show it at the start.
        """
        for name, value in (("alibi_slopes", alibi_slopes), ("sliding_window", sliding_window), ("logits_soft_cap", logits_soft_cap)):  # fmt: skip
            if value:
                raise ValueError(f"multi-head latent attention on an NPU has no {name} (got {value!r})")
        self.num_heads, self.scale = num_heads, scale
        self.kv_lora_rank = kv_lora_rank
        self.key_size, self.value_size = qk_nope_head_dim, v_head_dim
        self.kv_b_proj = kv_b_proj
        self.kv_cache_dtype = kv_cache_dtype

    def pieces(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's memory, `[blocks, block_size, 512 + 64]` to vLLM, as latents `[blocks, block_size, 512]` and, after all of them, rotated
        keys `[blocks, block_size, 64]`: the kernel wants each of them contiguous, and a copy of a block is made of both."""
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
        """Write this step's latents `[T, 512]` and rotated keys `[T, 1, 64]`. Padding tokens have no slot, and a step without requests has no tokens
        to write."""
        tokens = tokens_of_step()
        if not tokens:
            return
        latents, keys = (cache.unsqueeze(2) for cache in self.pieces(kv_cache))
        kernels.scatter_kv(kv_c_normed[:tokens].unsqueeze(1), k_pe[:tokens], latents, keys, slot_mapping[:tokens])

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
        latents, keys = self.pieces(kv_c_and_k_pe_cache)
        step = attn_metadata.decode
        assert step is not None
        graphs.note_attention(layer)
        out = kernels.latent_attention(
            query,
            query_rope,
            latents,
            keys,
            query_ends=step.query_ends,
            kv_lengths=step.kv_lengths,
            block_table=step.block_table,
            mask=step.mask,
            scale=self.scale,
        )
        return out, None

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: AscendMLAMetadata,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """The plain form: query `[T, N, 128 + 64]`, latents `[T, 512]` and rotated keys `[T, 1, 64]` of the new tokens -> output `[T, N * 128]`, written."""
        step = attn_metadata.prefill
        assert step is not None
        queries = (
            kernels.widened(q[..., : self.key_size], PLAIN_SIZE).contiguous(),
            q[..., self.key_size :].contiguous(),
        )
        key, value = self._projected(kv_c_normed)
        out, lse = kernels.prompt_latent_attention(
            queries,
            (key, k_pe),
            value,
            query_ends=step.query_ends,
            kv_ends=step.query_ends,
            mask=step.mask,
            scale=self.scale,
        )
        if step.chunks:
            out = out.float()  # so that each merge rounds to float32 alone
        for chunk in step.chunks:
            part, part_lse = self._context(chunk, queries, kv_c_and_k_pe_cache)
            tokens = chunk.tokens
            merged, merged_lse = kernels.merge_attention([out[tokens], part.float()], [lse[tokens], part_lse])
            out[tokens].copy_(merged)
            lse[tokens].copy_(merged_lse)
        output.view(-1, self.num_heads, self.value_size).copy_(out[..., : self.value_size])

    def _context(self, chunk: ContextChunk, queries: tuple[Tensor, Tensor], kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of a chunk's query tokens to its cached tokens, and the log-sum-exp."""
        latent_cache, key_cache = (cache.unsqueeze(2) for cache in self.pieces(kv_cache))
        latents, key_rope = kernels.gather_kv(
            latent_cache, key_cache, chunk.block_table, chunk.lengths, chunk.starts, chunk.kv_ends[-1]
        )
        key, value = self._projected(latents.squeeze(1))
        return kernels.prompt_latent_attention(
            (queries[0][chunk.tokens], queries[1][chunk.tokens]),
            (key, key_rope),
            value,
            query_ends=chunk.query_ends,
            kv_ends=chunk.kv_ends,
            mask=None,
            scale=self.scale,
        )

    def _projected(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[S, 512]` -> keys without their rotary part and values, `[S, N, 128]` each."""
        both = self.kv_b_proj(latents)[0].view(-1, self.num_heads, self.key_size + self.value_size)
        key, value = both[..., : self.key_size], both[..., self.key_size :]
        return kernels.widened(key, PLAIN_SIZE), kernels.widened(value, PLAIN_SIZE)


def reserve_workspace(model: nn.Module) -> None:
    """Let vLLM's profiling run, which reserves what a chunk's projected keys and values take, count also what is beside them at the same time: the
    latents read from the cache, contiguous copies of keys and values, and rotated keys for each head."""
    for layer in model.modules():
        if isinstance(layer, MLAAttention):
            heads, projected = layer.num_heads, layer.num_heads * (layer.qk_nope_head_dim + layer.v_head_dim)
            rope = layer.qk_rope_head_dim
            beside = layer.kv_lora_rank + rope + heads * (2 * PLAIN_SIZE + rope)
            layer._chunked_prefill_workspace_size = -(-layer.chunked_prefill_workspace_size * (projected + beside) // projected)  # fmt: skip
