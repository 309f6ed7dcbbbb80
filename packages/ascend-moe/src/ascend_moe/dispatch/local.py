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
        complete: whether it is known that every id was a slot of this rank, so that index has no -1 and all rows are written.
    """

    rows: Tensor
    counts: Tensor
    scales: Tensor | None
    index: Tensor
    weights: Tensor
    complete: bool


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
        padded: bool = True,
        quantise: bool = False,
        scales: Tensor | None = None,
    ) -> LocalRows:
        """Copy each token once for each of its slots on this rank.

        Args:
            x: `[T, H]`.
            weights: float32 `[T, K]`.
            ids: int32 `[T, K]` in 0..S; S, which no rank has, for padding.
            rows: A, at least the number of copies. None: T * K, which is always enough.
            padded: whether an id may be S.
            quantise: return int8 rows with scales.
            scales: float32 `[T]` where x is int8 already.
        """
        if not len(x):
            counts = torch.zeros(self._last - self._first, dtype=torch.int64, device=x.device)
            if quantise:
                x, scales = kernels.dynamic_quant(x)
            return LocalRows(rows=x, counts=counts, scales=scales, index=ids.flatten(), weights=weights, complete=True)
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
            complete=not padded and rows is None and self._last - self._first == self._num_slots,
        )

    def sum(self, rows: Tensor, sorted_rows: LocalRows) -> Tensor:
        """`[T, H]`: for each token the sum of its slots' results on this rank, `rows` `[A, H]`, times their weights.

        For an expert on another rank the last row is used with weight 0. That row has not been written then, and 0 times
        its contents might be NaN, so it is set to zeros first.
        """
        weights, index = sorted_rows.weights.to(rows.dtype), sorted_rows.index
        if not len(rows):
            return rows.new_zeros(len(weights), rows.shape[1])
        if not sorted_rows.complete:
            elsewhere = index < 0
            rows[-1:].masked_fill_(elsewhere.any(), 0.0)
            # In place where `weights` is a copy already, which saves another one.
            masked = weights.masked_fill if weights is sorted_rows.weights else weights.masked_fill_
            weights = masked(elsewhere.view_as(weights), 0.0)
            index = index.remainder(len(rows))  # -1 becomes the last row, and no other index changes
        return kernels.unpermute(rows, index, weights)
