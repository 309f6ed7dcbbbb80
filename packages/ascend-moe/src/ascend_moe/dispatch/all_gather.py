# SPDX-License-Identifier: Apache-2.0
"""All ranks have the same tokens; each computes its own slots' share. Nothing is sent here: see `prepare.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_moe import kernels
from ascend_moe.choose import CommMethod
from ascend_moe.dispatch.base import Dispatched, Dispatcher, check_routed, without_padding
from ascend_moe.env import MoeEnv

__all__ = ["AllGatherDispatcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gathered(Dispatched):
    weights: Tensor
    index: Tensor


class AllGatherDispatcher(Dispatcher):
    """Every rank of the EP group calls with the same tokens, weights and ids, and gets the sum over its own slots.

    So ids must not depend on the rank: a replica is chosen by token, or an expert is computed twice and another never.
    """

    method = CommMethod.ALL_GATHER

    def __init__(self, env: MoeEnv) -> None:
        """Note which slots are this rank's."""
        self._num_slots = env.num_slots
        self._first = env.ep.rank_in_group * env.slots_per_rank
        self._last = self._first + env.slots_per_rank

    def dispatch(
        self, x: Tensor, weights: Tensor, ids: Tensor, *, mask: Tensor | None = None, quantise: bool = False
    ) -> Dispatched:
        """See `Dispatcher`. A is T * K; how many of those rows are written, the host never learns."""
        check_routed(x, weights, ids, mask)
        if not len(x):
            counts = torch.zeros(self._last - self._first, dtype=torch.int64, device=x.device)
            rows, scales = kernels.dynamic_quant(x) if quantise else (x, None)
            return _Gathered(rows=rows, counts=counts, scales=scales, weights=weights, index=ids.flatten())
        routed = kernels.init_routing(
            x,
            without_padding(ids, mask, self._num_slots),
            num_slots=self._num_slots + 1,  # the one behind all is padding's
            first=self._first,
            last=self._last,
            quantise=quantise,
        )
        scales = routed.scales if quantise else None
        return _Gathered(rows=routed.rows, counts=routed.counts, scales=scales, weights=weights, index=routed.index)

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher`. The result is this rank's share: the ranks' shares have to be summed.

        Where a token's expert is elsewhere, it takes the last row with weight 0. That row is then an unwritten one, and is
        set to zero first: 0 times what lies in it might be NaN.
        """
        if not isinstance(dispatched, _Gathered):
            raise TypeError(f"dispatched is a {type(dispatched).__name__}, not from {type(self).__name__}.dispatch")
        if not len(rows):
            return rows
        last = len(rows) - 1
        rows[last:].masked_fill_(dispatched.counts.sum() <= last, 0.0)
        elsewhere = dispatched.index < 0
        weights = dispatched.weights.masked_fill(elsewhere.view_as(dispatched.weights), 0.0)
        return kernels.unpermute(rows, dispatched.index.masked_fill(elsewhere, last), weights.to(rows.dtype))
