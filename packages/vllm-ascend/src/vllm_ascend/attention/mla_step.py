# SPDX-License-Identifier: Apache-2.0
"""One step of multi-head latent attention: which requests take the absorbed form, which the plain one, and in which chunks their context is read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonMetadataBuilder,
    get_mla_dims,
    plan_mla_context_chunks,
)
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_ascend import kernels
from vllm_ascend.attention.limits import LATENT_QUERIES, check_cache, has_plain_form
from vllm_ascend.attention.step import AscendAttentionMetadata, describe

__all__ = [
    "Absorbed",
    "AscendMLAMetadata",
    "AscendMLAMetadataBuilder",
    "ContextChunk",
    "Plain",
    "context_chunks",
    "tiles",
]


@dataclass(frozen=True, slots=True)
class Absorbed:
    """Requests of the absorbed form, of at most 16 query tokens each.

    Attributes:
        query_ends: cumulative query lengths.
        kv_lengths: keys of each.
        block_table: int32 `[requests, blocks]`.
        mask: the compressed causal mask; None where each has one query token.
    """

    query_ends: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class ContextChunk:
    """Cached tokens of some requests, one request after the other, which are projected up and attended to at once.

    Attributes:
        tokens: the query tokens of these requests among those of the plain form.
        query_ends: cumulative query lengths of these requests.
        kv_ends: cumulative lengths of the cached tokens.
        block_table: int32 `[requests, blocks]`.
        lengths: int32 `[requests]`, cached tokens of each in this chunk.
        starts: int32 `[requests]`, the first of them; multiples of the block size.
    """

    tokens: slice
    query_ends: list[int]
    kv_ends: list[int]
    block_table: Tensor
    lengths: Tensor
    starts: Tensor


@dataclass(frozen=True, slots=True)
class Plain:
    """Requests of the plain form: their new tokens, and what is cached of them.

    Attributes:
        query_ends: cumulative query lengths, from the first token of the first of these requests.
        mask: the compressed causal mask.
        chunks: of cached tokens; none where no request has any.
    """

    query_ends: list[int]
    mask: Tensor
    chunks: list[ContextChunk]


@dataclass(slots=True)
class AscendMLAMetadata(AttentionMetadata):
    """One step: first the requests of the absorbed form, which vLLM's layer calls decodes, then those of the plain form, its prefills.

    Attributes:
        num_actual_tokens: query tokens, without padding.
        query_ends: cumulative query lengths of all requests.
        num_decode_tokens: query tokens of the absorbed form.
        num_decodes: its requests.
        num_prefills: requests of the plain form.
        decode: the absorbed form; None without requests.
        prefill: the plain form; None without requests.
    """

    num_actual_tokens: int
    query_ends: list[int]
    num_decode_tokens: int
    num_decodes: int
    num_prefills: int
    decode: Absorbed | None
    prefill: Plain | None

    @property
    def num_requests(self) -> int:
        """Requests of the step."""
        return len(self.query_ends)

    @property
    def kv_lengths(self) -> list[int]:
        """Keys of each request of the absorbed form, of which alone a captured step consists."""
        assert self.decode is not None
        return self.decode.kv_lengths


def tiles(query_ends: list[int], kv_lengths: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Cut requests into pieces of at most 16 query tokens, each of which ends where its last token's keys end.

    Args:
        query_ends: cumulative query lengths of the requests.
        kv_lengths: keys of each request, its new tokens among them.

    Returns:
        Of each piece its request, the cumulative query length and the keys.
    """
    requests, ends, keys = [], [], []
    begin = 0
    for request, (end, length) in enumerate(zip(query_ends, kv_lengths, strict=True)):
        for cut in [*range(begin + LATENT_QUERIES, end, LATENT_QUERIES), end]:
            requests.append(request)
            ends.append(cut)
            keys.append(length - (end - cut))
        begin = end
    return requests, ends, keys


def context_chunks(
    query_lengths: list[int], contexts: list[int], block_table: Tensor, *, rows: int, block_size: int
) -> list[ContextChunk]:
    """Divide what is cached of requests into chunks of at most `rows` tokens; a request that is divided goes on at the start of a block.

    Args:
        query_lengths: new tokens of each request.
        contexts: cached tokens of each request.
        block_table: int32 `[requests, blocks]`.
        rows: tokens of a chunk at most, a multiple of block_size.
        block_size: tokens of a block.
    """
    begins = [0, *accumulate(query_lengths)]
    chunks = []
    for plan in plan_mla_context_chunks(contexts, rows, rows, block_size, lambda tokens: tokens):
        first, last = plan.request_start, plan.request_end
        on_device = async_tensor_h2d([*plan.seq_lens, *plan.starts], device=block_table.device, dtype=torch.int32)
        lengths, starts = on_device[: last - first], on_device[last - first :]
        chunks.append(
            ContextChunk(
                tokens=slice(begins[first], begins[last]),
                query_ends=list(accumulate(query_lengths[first:last])),
                kv_ends=list(accumulate(plan.seq_lens)),
                block_table=block_table[first:last],
                lengths=lengths,
                starts=starts,
            )
        )
    return chunks


class AscendMLAMetadataBuilder(AttentionMetadataBuilder[AscendMLAMetadata]):
    """Turns vLLM's description of a step into kernel arguments. Requests of at most 16 new tokens come first, by `reorder_batch_threshold`."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """Copy the causal mask to the device; find out whether prompts of this model take the plain form, and in how large chunks their context.

        Raises:
            ValueError: the cache is too large for the kernel.
        """
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.mask = kernels.causal_mask(device)
        dims, cache = get_mla_dims(vllm_config.model_config), vllm_config.cache_config
        self.block_size = cache.block_size
        check_cache(cache.num_gpu_blocks or 0, cache.block_size, dims.kv_lora_rank)
        self.rows = MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size(vllm_config)
        self.plain = has_plain_form(dims.qk_nope_head_dim, dims.v_head_dim)
        if self.plain:
            self._init_reorder_batch_threshold(LATENT_QUERIES)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AscendMLAMetadata:
        """One step."""
        step = describe(common_attn_metadata, self.mask)
        if not step.causal:
            raise ValueError("multi-head latent attention on an NPU is causal, got causal=False")
        lengths = [end - begin for begin, end in zip([0, *step.query_ends], step.query_ends, strict=False)]
        requests = len(lengths)
        absorbed = next((i for i, n in enumerate(lengths) if n > LATENT_QUERIES), requests) if self.plain else requests
        tokens = step.query_ends[absorbed - 1] if absorbed else 0
        decode = self._absorbed(step, absorbed) if absorbed else None
        return AscendMLAMetadata(
            num_actual_tokens=step.num_actual_tokens,
            query_ends=step.query_ends,
            num_decode_tokens=tokens,
            num_decodes=absorbed,
            num_prefills=requests - absorbed,
            decode=decode,
            prefill=self._plain(step, lengths, absorbed) if absorbed < requests else None,
        )

    def _absorbed(self, step: AscendAttentionMetadata, count: int) -> Absorbed:
        """The first `count` requests."""
        requests, ends, keys = tiles(step.query_ends[:count], step.kv_lengths[:count])
        block_table = step.block_table[:count]
        if len(requests) > count:
            block_table = block_table[async_tensor_h2d(requests, device=self.device, dtype=torch.int64)]
        return Absorbed(ends, keys, block_table, step.mask if len(ends) < ends[-1] else None)

    def _plain(self, step: AscendAttentionMetadata, lengths: list[int], skipped: int) -> Plain:
        """The requests after the first `skipped`."""
        lengths = lengths[skipped:]
        contexts = [keys - new for keys, new in zip(step.kv_lengths[skipped:], lengths, strict=True)]
        chunks = context_chunks(
            lengths, contexts, step.block_table[skipped:], rows=self.rows, block_size=self.block_size
        )
        return Plain(list(accumulate(lengths)), step.mask, chunks)
