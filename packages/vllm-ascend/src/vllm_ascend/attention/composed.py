# SPDX-License-Identifier: Apache-2.0
"""Attention that no NPU kernel takes, composed of single operators: a soft cap on scores, ALiBi, and pictures whose tokens see each other both ways.

It is slow: every layer reads the keys of all requests into memory of its own, and a step launches some fifteen operators for each prompt in each
layer. `limits.notices` says so at the start. Numbers are float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_ascend.attention.gqa import AscendAttentionBackend, AscendAttentionImpl, AscendAttentionMetadataBuilder
from vllm_ascend.attention.step import AscendAttentionMetadata, groups

__all__ = ["AscendComposedAttentionBackend", "AscendComposedAttentionImpl", "ComposedMetadata", "Scores", "attend"]

_MOST_SCORES = 2**26  # numbers of one tensor of scores, 256 MB; longer prompts take several


class AscendComposedAttentionBackend(AscendAttentionBackend):
    """Names the parts. Keys and values are kept as for the kernel, which computes what it can."""

    @staticmethod
    def get_impl_cls() -> type[AscendComposedAttentionImpl]:
        """The class a layer runs."""
        return AscendComposedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[ComposedMetadataBuilder]:
        """The class that prepares a step."""
        return ComposedMetadataBuilder

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Pictures in a prompt may see their own later tokens."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Requests may see all their tokens."""
        return True


@dataclass(slots=True)
class Part:
    """Consecutive requests of a step with one query token each, or one request with several.

    Attributes:
        rows: of the step's tokens.
        block_table: int32 `[B, blocks]`, as many as the longest of the requests needs.
        ends: `[B]`, keys of each.
        spans: first and last position of each picture of the one request.
    """

    rows: slice
    block_table: Tensor
    ends: Tensor
    spans: Sequence[tuple[int, int]]

    def positions(self) -> Tensor:
        """`[B, T]`: of the query tokens in their requests."""
        tokens = (self.rows.stop - self.rows.start) // len(self.ends)
        found: Tensor = self.ends[:, None] - tokens + torch.arange(tokens, device=self.ends.device)
        return found


@dataclass(slots=True)
class ComposedMetadata(AscendAttentionMetadata):
    """One step, with the pieces that are computed at once.

    Attributes:
        parts: the step's requests, in their order.
        mm_prefix_range: the positions of pictures as vLLM gives them. A model sets None, under this name, for layers in which pictures are seen as text is.
    """

    parts: list[Part]
    mm_prefix_range: dict[int, list[tuple[int, int]]] | None

    @property
    def sees_both_ways(self) -> bool:
        """Whether a picture with several tokens is among the step's queries."""
        return self.mm_prefix_range is not None and any(part.spans for part in self.parts)


class ComposedMetadataBuilder(AscendAttentionMetadataBuilder):
    """Adds to the kernel's arguments what single operators need."""

    _cudagraph_support = AttentionCGSupport.NEVER  # the parts of a step depend on its lengths

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ComposedMetadata:
        """One step."""
        step = super().build(common_prefix_len, common_attn_metadata, fast_build)
        shared = {item.name: getattr(step, item.name) for item in fields(AscendAttentionMetadata)}
        spans = common_attn_metadata.mm_req_doc_ranges or {}
        assert isinstance(self.kv_cache_spec, AttentionSpec)
        # The kernel's table may number blocks in another way.
        table = common_attn_metadata.block_table_tensor
        parts = _parts(step, common_attn_metadata.seq_lens, table, spans, self.kv_cache_spec.block_size)
        return ComposedMetadata(**shared, parts=list(parts), mm_prefix_range=spans)


def _parts(
    step: AscendAttentionMetadata,
    ends: Tensor,
    table: Tensor,
    spans: dict[int, list[tuple[int, int]]],
    block_size: int,
) -> Iterator[Part]:
    """The step in the pieces that are computed at once.

    Args:
        step: the kernel's arguments.
        ends: keys of each request, on the device.
        table: the blocks of each request.
        spans: by request, first and last position of each picture whose tokens see each other.
        block_size: tokens of a block.
    """
    for first, last, rows in groups(step.query_ends, lambda request, tokens: None if tokens == 1 else request):
        tokens = rows.stop - rows.start
        blocks = -(-max(step.kv_lengths[first:last]) // block_size)
        seen = step.kv_lengths[first] - tokens  # in earlier steps
        in_sight = [] if tokens == last - first else [span for span in spans.get(first, []) if span[1] >= seen]
        yield Part(rows, table[first:last, :blocks], ends[first:last], in_sight)


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of the product of a query and a key.

    Args:
        scale: the factor of the product.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; 0: they stay.
        slopes: float32 `[N]`; the distance from query to key times a head's slope is added. None: nothing is.
    """

    scale: float
    soft_cap: float = 0.0
    slopes: Tensor | None = None

    @property
    def are_products(self) -> bool:
        """Whether nothing but scaling becomes of it, as in the kernel."""
        return not self.soft_cap and self.slopes is None


def attend(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, distance: Tensor, scores: Scores) -> Tensor:
    """Attention in float32.

    Args:
        query: `[B, T, N, D]`.
        keys, values: `[B, S, Nkv, D]`, finite.
        allowed: bool `[B, T, S]`: whether a query sees a key; it sees one at least.
        distance: `[B, T, S]`: the key's position less the query's.
        scores: scale, soft cap and slopes.

    Returns:
        float32 `[B, T, N, D]`.
    """
    batch, tokens, heads, size = query.shape
    groups = keys.shape[2]
    shape = (batch, groups, heads // groups, tokens, keys.shape[1])
    rows = query.float().view(batch, tokens, groups, -1, size).permute(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)
    found = (rows @ keys.float().permute(0, 2, 3, 1)).view(shape) * scores.scale
    if scores.soft_cap:
        found = torch.tanh(found / scores.soft_cap) * scores.soft_cap
    if scores.slopes is not None:
        found = found + scores.slopes.to(distance.device).view(1, groups, -1, 1, 1) * distance[:, None, None]
    weights = found.masked_fill(~allowed[:, None, None], -torch.inf).softmax(dim=-1)
    out = weights.view(batch, groups, -1, shape[-1]) @ values.float().transpose(1, 2)
    return out.view(*shape[:-1], size).permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads, size)


class AscendComposedAttentionImpl(AscendAttentionImpl):
    """One layer's attention, by the kernel in steps for which it has a form."""

    backend = AscendComposedAttentionBackend
    takes = frozenset({"alibi_slopes", "logits_soft_cap"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Store what is done to scores. ValueError as of the class above."""
        super().__init__(*args, **kwargs)
        slopes = torch.tensor(self.alibi_slopes, dtype=torch.float32) if self.alibi_slopes else None
        self.scores = Scores(self.scale, self.logits_soft_cap or 0.0, slopes)

    def _attend(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        step: AscendAttentionMetadata,
    ) -> Tensor:
        """As the class above."""
        assert isinstance(step, ComposedMetadata)  # of this backend's builder
        if self.scores.are_products and not step.sees_both_ways:
            return super()._attend(layer, query, key, value, kv_cache, step)
        clamped = getattr(layer, "mm_prefix_clamp_sliding_window", False)
        parts = []
        for part in step.parts:
            spans = part.spans if step.sees_both_ways else ()
            sight = partial(self._sight, spans=spans, causal=step.causal, clamped=clamped)
            parts.append(self._of_part(query[part.rows], kv_cache, part, sight))
        return torch.cat(parts).to(query.dtype)

    def _of_part(
        self, query: Tensor, kv_cache: Tensor, part: Part, sight: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """`[B * T, N, D]`, float32. `sight` is `_sight` with all but its first arguments."""
        batch, blocks = part.block_table.shape
        # [B, blocks, 2, block_size, Nkv * D] -> two of [B, S, Nkv, D]
        read = kv_cache.index_select(0, part.block_table.flatten()).view(batch, blocks, *kv_cache.shape[1:]).unbind(2)
        held = torch.arange(blocks * kv_cache.shape[2], device=query.device) < part.ends[:, None]
        # What lies in a block after a request's last key was never written, or is another's.
        keys, values = (
            rows.reshape(batch, -1, self.num_kv_heads, self.kernel_size)[..., : self.head_size].masked_fill(
                ~held[..., None, None], 0
            )
            for rows in read
        )
        positions = part.positions()
        queries = query.view(batch, -1, self.num_heads, self.head_size)
        most = max(_MOST_SCORES // (batch * self.num_heads * held.shape[1]), 1)
        outs = []
        for rows, at in zip(torch.split(queries, most, dim=1), torch.split(positions, most, dim=1), strict=True):
            allowed, distance = sight(at, held)
            outs.append(attend(rows, keys, values, allowed, distance, self.scores))
        return torch.cat(outs, dim=1).flatten(0, 1)

    def _sight(
        self, positions: Tensor, held: Tensor, *, spans: Sequence[tuple[int, int]], causal: bool, clamped: bool
    ) -> tuple[Tensor, Tensor]:
        """Whether queries at positions `[B, T]` see the keys `[B, S]` that are held, and how far these are: two of `[B, T, S]`.

        Tokens of a picture see all of it, or with `clamped` what of it is not before their window.
        """
        keys = torch.arange(held.shape[1], device=held.device)
        distance = keys - positions[..., None]
        allowed = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if self.sliding_window is not None:
            allowed = allowed & (distance.abs() < self.sliding_window)
        for first, last in spans:
            inside = (positions >= first) & (positions <= last)
            seen = inside[..., None] & (keys >= first) & (keys <= last)
            if clamped and self.sliding_window is not None:
                seen = seen & (distance > -self.sliding_window)
            allowed = allowed | seen
        return allowed & held[:, None], distance
