# SPDX-License-Identifier: Apache-2.0
"""Tokens of this rank sorted by its slots, and the results of these slots summed for each token.

Legend: T tokens here, K experts per token, H hidden, L slots of this rank, A rows sorted by slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_moe import kernels
from ascend_moe.env import MoeEnv

__all__ = ["LocalRows", "LocalSlots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRows:
    """Tokens sorted by slot.

    Attributes:
        rows: `[A, H]`, the first `counts.sum()` of them written.
        counts: int64 `[L]`.
        scales: float32 `[A]` where the rows are int8, else None.
        index: int32 `[T * K]`, for each token and each of its experts the row, -1 where that expert is on another rank.
        weights: float32 `[T, K]`.
    """

    rows: Tensor
    counts: Tensor
    scales: Tensor | None
    index: Tensor
    weights: Tensor


class LocalSlots:
    """The slots of one rank."""

    def __init__(self, env: MoeEnv) -> None:
        """Store the range of this rank's slots."""
        self._num_slots = env.num_slots
        self._first = env.ep.rank_in_group * env.slots_per_rank
        self._last = self._first + env.slots_per_rank

    def sort(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        *,
        rows: int | None = None,
        quantise: bool = False,
        scales: Tensor | None = None,
    ) -> LocalRows:
        """Copy each token once for each of its slots on this rank.

        Args:
            x: `[T, H]`.
            weights: float32 `[T, K]`.
            ids: int32 `[T, K]` in 0..S; S, which no rank has, for padding.
            rows: A, at least the number of copies. None: T * K, which is always enough.
            quantise: return int8 rows with scales.
            scales: float32 `[T]` where x is int8 already.
        """
        if not len(x):
            counts = torch.zeros(self._last - self._first, dtype=torch.int64, device=x.device)
            if quantise:
                x, scales = kernels.dynamic_quant(x)
            return LocalRows(rows=x, counts=counts, scales=scales, index=ids.flatten(), weights=weights)
        routed = kernels.init_routing(
            x,
            ids,
            scales,
            rows=ids.numel() if rows is None else min(rows, ids.numel()),
            num_slots=self._num_slots + 1,
            first=self._first,
            last=self._last,
            quantise=quantise,
        )
        has_scales = quantise or scales is not None
        return LocalRows(
            rows=routed.rows,
            counts=routed.counts,
            scales=routed.scales if has_scales else None,
            index=routed.row_index,
            weights=weights,
        )

    def sum(self, rows: Tensor, sorted_rows: LocalRows) -> Tensor:
        """`[T, H]`: for each token the sum of its slots' results on this rank, `rows` `[A, H]`, times their weights.

        For an expert on another rank the last row is used with weight 0. That row has not been written then, and 0 times
        its contents might be NaN, so it is set to zeros first.
        """
        if not len(rows):
            return rows.new_zeros(len(sorted_rows.weights), rows.shape[1])
        last = len(rows) - 1
        rows[last:].masked_fill_(sorted_rows.counts.sum() <= last, 0.0)
        elsewhere = sorted_rows.index < 0
        weights = sorted_rows.weights.masked_fill(elsewhere.view_as(sorted_rows.weights), 0.0)
        return kernels.unpermute(rows, sorted_rows.index.masked_fill(elsewhere, last), weights.to(rows.dtype))
