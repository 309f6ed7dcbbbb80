# SPDX-License-Identifier: Apache-2.0
"""Each rank sends its own tokens to the ranks of their slots. The host waits once, for how many go where."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_moe import kernels
from ascend_moe.choose import CommMethod
from ascend_moe.dispatch.base import Dispatched, Dispatcher, check_routed, without_padding
from ascend_moe.env import MoeEnv
from ascend_moe.load import slot_load

__all__ = ["AllToAllDispatcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchanged(Dispatched):
    weights: Tensor
    sent_order: Tensor
    received_order: Tensor
    sent: list[int]
    received: list[int]


class AllToAllDispatcher(Dispatcher):
    """The ranks have different tokens, as many as they like. What is sent is exactly what experts need."""

    method = CommMethod.ALL_TO_ALL_V

    def __init__(self, env: MoeEnv) -> None:
        """Note the group and its slots."""
        self._ep = env.ep
        self._num_slots = env.num_slots
        self._slots_per_rank = env.slots_per_rank

    def dispatch(
        self, x: Tensor, weights: Tensor, ids: Tensor, *, mask: Tensor | None = None, quantise: bool = False
    ) -> Dispatched:
        """See `Dispatcher`. All A rows are written."""
        check_routed(x, weights, ids, mask)
        ranks, slots = self._ep.world_size, self._slots_per_rank
        counts_S = slot_load(ids, self._num_slots, mask)
        received_RL = self._ep.all_to_all(counts_S).view(ranks, slots)
        # The only wait: both directions in one copy to the host.
        splits = torch.stack([counts_S.view(ranks, slots).sum(dim=1), received_RL.sum(dim=1)]).tolist()
        sent: list[int] = splits[0]
        received: list[int] = splits[1]

        rows, sent_order = kernels.permute(x, without_padding(ids, mask, self._num_slots))
        rows = rows[: sum(sent)]  # padding lies behind them
        scales = None
        if quantise:
            rows, own_scales = kernels.dynamic_quant(rows)
            scales = self._ep.all_to_all(own_scales, received, sent)
        rows = self._ep.all_to_all(rows, received, sent)

        rows, scales, source = kernels.by_slot(rows, received_RL, scales)
        return _Exchanged(
            rows=rows,
            counts=received_RL.sum(dim=0),
            scales=scales,
            weights=weights,
            sent_order=sent_order,
            received_order=_inverse(source),
            sent=sent,
            received=received,
        )

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher`. The result is complete; that of padding is zero."""
        if not isinstance(dispatched, _Exchanged):
            raise TypeError(f"dispatched is a {type(dispatched).__name__}, not from {type(self).__name__}.dispatch")
        rows = kernels.unpermute(rows, dispatched.received_order)
        rows = self._ep.all_to_all(rows, dispatched.sent, dispatched.received)
        unsent = dispatched.weights.numel() - len(rows)
        if unsent:
            rows = torch.cat([rows, rows.new_zeros(unsent, rows.shape[1])])
        return kernels.unpermute(rows, dispatched.sent_order, dispatched.weights.to(rows.dtype))


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation, int32 `[A]`."""
    places = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return torch.empty_like(order).scatter_(0, order.long(), places)
