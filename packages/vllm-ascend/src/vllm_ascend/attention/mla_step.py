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
    MLADims,
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

from vllm_ascend.attention import kernels
from vllm_ascend.attention.limits import LATENT_PIECES, LATENT_QUERIES, PLAIN_SIZE, check_cache, has_plain_form
from vllm_ascend.attention.step import AscendAttentionMetadata, describe

__all__ = [
    "Absorbed",
    "AscendMLAMetadata",
    "AscendMLAMetadataBuilder",
    "ContextChunk",
    "Forms",
    "Plain",
    "context_chunks",
    "tiles",
]


@dataclass(frozen=True, slots=True)
class Absorbed:
    """Requests of the absorbed form, cut into pieces of at most 16 query tokens each.

    Attributes:
        query_ends: cumulative query lengths of the pieces.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """Which requests take the absorbed form and which the plain one, by the operations of one head.

    The absorbed form multiplies 2 L + R numbers for each pair of a token and a key that it sees, L those of a latent and R those of a rotated key. The plain
    form multiplies 2 * 128 + R of them, and L times the numbers of a key and a value for each cached token, which it projects up. (Either form projects
    its new tokens: keys and values up, or queries into the latent space and results out of it.) So a request of n new and C cached tokens is cheaper in the
    absorbed form while its pairs, n C + n (n + 1) / 2, times 2 (L - 128) are fewer than C L (K + V): without cached tokens never, and with many of them up to
    170 new tokens for keys and values of 128 numbers. benchmarks/attention counts both, and the bytes.

    Args:
        latent: L.
        projected: K + V, the numbers of a key without its rotary part and of a value.
        most_tokens: new tokens of a step that may take the absorbed form beside those of requests that the kernel takes in one piece.
    """

    latent: int
    projected: int
    most_tokens: int

    @property
    def most_new(self) -> int:
        """The most new tokens of a request that may take the absorbed form."""
        return max(LATENT_QUERIES, self.latent * self.projected // (2 * (self.latent - PLAIN_SIZE)))

    def absorbed(self, lengths: list[int], contexts: list[int]) -> int:
        """How many requests take the absorbed form, counted from the first: those after the first that does not take it do not either.

        Requests of at most 16 new tokens take it whatever is cached of them, so that a step of decoding is of one form.

        Args:
            lengths: new tokens of each request.
            contexts: cached tokens of each request.
        """
        tokens = 0
        for request, (new, cached) in enumerate(zip(lengths, contexts, strict=True)):
            tokens += new
            if new <= LATENT_QUERIES:
                continue
            pairs = new * cached + new * (new + 1) // 2
            costs_less = 2 * (self.latent - PLAIN_SIZE) * pairs < self.latent * self.projected * cached
            if tokens > self.most_tokens or not costs_less:
                return request
        return len(lengths)


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
    """Turns vLLM's description of a step into kernel arguments. By `reorder_batch_threshold` requests come in this order: few new tokens after cached
    ones, more of them after cached ones, and those of which nothing is cached."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

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
        self.forms = _forms(dims, self.rows, vllm_config.scheduler_config.max_num_seqs)
        if self.plain:
            self._init_reorder_batch_threshold(self.forms.most_new)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AscendMLAMetadata:
        """One step."""
        step = describe(common_attn_metadata, self.mask)
        if not step.causal:
            raise ValueError("multi-head latent attention on an NPU is causal, got causal=False")
        lengths = [end - begin for begin, end in zip([0, *step.query_ends], step.query_ends, strict=False)]
        requests = len(lengths)
        contexts = [keys - new for keys, new in zip(step.kv_lengths, lengths, strict=True)]
        absorbed = self.forms.absorbed(lengths, contexts) if self.plain else requests
        tokens = step.query_ends[absorbed - 1] if absorbed else 0
        decode = self._absorbed(step, absorbed) if absorbed else None
        return AscendMLAMetadata(
            num_actual_tokens=step.num_actual_tokens,
            query_ends=step.query_ends,
            num_decode_tokens=tokens,
            num_decodes=absorbed,
            num_prefills=requests - absorbed,
            decode=decode,
            prefill=self._plain(step, lengths[absorbed:], contexts[absorbed:]) if absorbed < requests else None,
        )

    def _absorbed(self, step: AscendAttentionMetadata, count: int) -> Absorbed:
        """The first `count` requests."""
        requests, ends, keys = tiles(step.query_ends[:count], step.kv_lengths[:count])
        block_table = step.block_table[:count]
        if len(requests) > count:
            block_table = block_table[async_tensor_h2d(requests, device=self.device, dtype=torch.int64)]
        return Absorbed(ends, keys, block_table, step.mask if len(ends) < ends[-1] else None)

    def _plain(self, step: AscendAttentionMetadata, lengths: list[int], contexts: list[int]) -> Plain:
        """The last requests, which have these new and cached tokens."""
        block_table = step.block_table[step.num_requests - len(lengths) :]
        chunks = context_chunks(lengths, contexts, block_table, rows=self.rows, block_size=self.block_size)
        return Plain(list(accumulate(lengths)), step.mask, chunks)


def _forms(dims: MLADims, rows: int, requests: int) -> Forms:
    """Of a model whose plain form projects chunks of `rows` cached tokens, with at most `requests` in a step.

    The absorbed form holds, of each token and head, its query in the latent space, a contiguous copy of it, and the result, which must fit where
    `reserve_workspace` has counted the plain form's chunk: projected keys and values, contiguous copies, and rotated keys. The kernel takes 4,096 pieces.
    """
    latent, rope = dims.kv_lora_rank, dims.qk_rope_head_dim
    projected = dims.qk_nope_head_dim + dims.v_head_dim
    by_memory = rows * (projected + 2 * PLAIN_SIZE + rope) // (3 * (latent + rope))
    by_pieces = (LATENT_PIECES - requests) * LATENT_QUERIES
    return Forms(latent=latent, projected=projected, most_tokens=max(0, min(by_memory, by_pieces)))
