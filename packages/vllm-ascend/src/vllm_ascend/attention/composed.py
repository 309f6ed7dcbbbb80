# SPDX-License-Identifier: Apache-2.0
"""Attention that no NPU kernel takes, composed of single operators: a soft cap on scores, ALiBi, and pictures whose tokens see each other both ways.

It is slow: every layer reads the keys of all requests into memory of its own, and a step launches some fifteen operators for each prompt in each
layer. `limits.notices` says so at the start. Numbers are float32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, CommonAttentionMetadata

from vllm_ascend.attention.gqa import AscendAttentionBackend, AscendAttentionImpl, AscendAttentionMetadataBuilder
from vllm_ascend.attention.step import AscendAttentionMetadata, describe

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
    """One step, with the device's own lengths.

    Attributes:
        ends: `[requests]`, keys of each, on the device.
        spans: by request, first and last position of each picture whose tokens see each other.
    """

    ends: Tensor
    spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def sees_both_ways(self) -> bool:
        """Whether a picture with several tokens is among the step's queries."""
        return any(part_spans for *_, part_spans in self._runs())

    def parts(self, block_size: int) -> Iterator[Part]:
        """The step in the pieces that are computed at once."""
        for first, last, rows, spans in self._runs():
            blocks = -(-max(self.kv_lengths[first:last]) // block_size)
            yield Part(rows, self.block_table[first:last, :blocks], self.ends[first:last], spans)

    def _runs(self) -> Iterator[tuple[int, int, slice, list[tuple[int, int]]]]:
        """First request, the one after the last, rows, and the pictures that are in sight of several of these rows."""
        starts = [0, *self.query_ends]
        single = [end - start == 1 for start, end in zip(starts, self.query_ends, strict=False)]
        for several, group in groupby(range(len(single)), key=lambda request: None if single[request] else request):
            requests = list(group)
            first, last = requests[0], requests[-1] + 1
            rows = slice(starts[first], starts[last])
            seen = self.kv_lengths[first] - (rows.stop - rows.start)  # tokens of earlier steps
            spans = [] if several is None else [span for span in self.spans.get(first, []) if span[1] >= seen]
            yield first, last, rows, spans


class ComposedMetadataBuilder(AscendAttentionMetadataBuilder):
    """Adds to the kernel's arguments what single operators need."""

    _cudagraph_support = AttentionCGSupport.NEVER  # the parts of a step depend on its lengths

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ComposedMetadata:
        """One step."""
        step = describe(common_attn_metadata, self.mask)
        shared = {name.name: getattr(step, name.name) for name in fields(AscendAttentionMetadata)}
        ends = common_attn_metadata.seq_lens[: step.num_requests]
        return ComposedMetadata(**shared, ends=ends, spans=common_attn_metadata.mm_req_doc_ranges or {})


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
        found = found + scores.slopes.view(1, groups, -1, 1, 1) * distance[:, None, None]
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
        """As the class above."""
        step = attn_metadata
        plain = not self.scores.soft_cap and self.scores.slopes is None
        if not isinstance(step, ComposedMetadata) or (plain and not step.sees_both_ways):
            return super().forward(layer, query, key, value, kv_cache, step, output)
        for part in step.parts(kv_cache.shape[2]):
            out = output[part.rows]
            out.copy_(self._of_part(query[part.rows], kv_cache, part, causal=step.causal).reshape(out.shape))
        return output

    def _of_part(self, query: Tensor, kv_cache: Tensor, part: Part, *, causal: bool) -> Tensor:
        """`[B * T, N, D]`, float32."""
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
            allowed, distance = self._sight(at, held, part.spans, causal=causal)
            outs.append(attend(rows, keys, values, allowed, distance, self._on(query.device)))
        return torch.cat(outs, dim=1).flatten(0, 1)

    def _sight(
        self, positions: Tensor, held: Tensor, spans: Sequence[tuple[int, int]], *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Whether queries at positions `[B, T]` see the keys `[B, S]` that are held, and how far these are: two of `[B, T, S]`."""
        keys = torch.arange(held.shape[1], device=held.device)
        distance = keys - positions[..., None]
        allowed = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if self.sliding_window is not None:
            allowed = allowed & (distance.abs() < self.sliding_window)
        for first, last in spans:
            inside = (positions >= first) & (positions <= last)
            allowed = allowed | (inside[..., None] & (keys >= first) & (keys <= last))
        return allowed & held[:, None], distance

    def _on(self, device: torch.device) -> Scores:
        """The scores' terms, with the slopes on the device; they are moved at the first step."""
        slopes = self.scores.slopes
        if slopes is not None and slopes.device != device:
            self.scores = Scores(self.scores.scale, self.scores.soft_cap, slopes.to(device))
        return self.scores
