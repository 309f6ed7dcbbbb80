# SPDX-License-Identifier: Apache-2.0
"""Each rank sends its own tokens to the ranks of their slots. The host waits once, for the numbers of rows to send and receive.

A token is sent once to each rank that has one or more of its slots, and that rank returns one sum for it.

Legend: T tokens of this rank, K experts per token, R ranks, H hidden, S slots of all ranks, B tokens received.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_moe import kernels
from ascend_moe.choose import CommMethod
from ascend_moe.dispatch.base import Dispatched, Dispatcher, check_routed, without_padding
from ascend_moe.dispatch.local import LocalRows, LocalSlots
from ascend_moe.env import MoeEnv
from ascend_moe.load import slot_load

__all__ = ["AllToAllDispatcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchanged(Dispatched):
    local: LocalRows
    index: Tensor  # int32 [T * K]: the row that was sent for this token to the rank of this expert
    counted: Tensor  # bool [T, K]: the first of the token's experts on each rank, which stands for that rank's sum
    sent: list[int]
    received: list[int]


class AllToAllDispatcher(Dispatcher):
    """The ranks have different tokens, and may have different numbers of them."""

    method = CommMethod.ALL_TO_ALL_V

    def __init__(self, env: MoeEnv) -> None:
        """Store the group and the range of this rank's slots."""
        self._ep = env.ep
        self._num_slots = env.num_slots
        self._slots_per_rank = env.slots_per_rank
        self._slots = LocalSlots(env)

    def dispatch(
        self, x: Tensor, weights: Tensor, ids: Tensor, *, mask: Tensor | None = None, quantise: bool = False
    ) -> Dispatched:
        """See `Dispatcher`. A is one more than the rows that are written, or exactly these."""
        check_routed(x, weights, ids, mask)
        ranks, top_k = self._ep.world_size, ids.shape[1]
        owner_TK = without_padding(ids // self._slots_per_rank, mask, ranks)
        first_TK = _first_equal(owner_TK)
        counted_TK = (first_TK == torch.arange(top_k, device=ids.device)) & (owner_TK < ranks)
        target_TK = torch.where(counted_TK, owner_TK, ranks)
        sent, received, written = self._exchange_sizes(owner_TK, target_TK)

        # Sorted by target rank; rows that are not sent come last. Ids and weights are sent as one int32 tensor.
        rows, order = kernels.permute(x, target_TK)
        rows = rows[: sum(sent)]
        token_of_row = _inverse(order)[: sum(sent)] // top_k
        described = torch.cat([without_padding(ids, mask, self._num_slots), weights.view(torch.int32)], dim=1)
        described = described.index_select(0, token_of_row)
        if quantise:
            rows, scales = kernels.dynamic_quant(rows)
            described = torch.cat([described, scales.view(torch.int32).unsqueeze(1)], dim=1)
        rows = self._ep.all_to_all(rows, received, sent)
        described = self._ep.all_to_all(described, received, sent)

        local = self._slots.sort(
            rows,
            described[:, top_k : 2 * top_k].contiguous().view(torch.float32),
            described[:, :top_k].contiguous(),
            rows=written + 1,
            scales=described[:, 2 * top_k].contiguous().view(torch.float32) if quantise else None,
        )
        return _Exchanged(
            rows=local.rows,
            counts=local.counts,
            scales=local.scales,
            local=local,
            index=order.view_as(ids).gather(1, first_TK).flatten(),
            counted=counted_TK,
            sent=sent,
            received=received,
        )

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher`. The result is complete; that of padding is undefined.

        Of several experts on one rank only the first has weight 1; the others have weight 0 on the same sum, so that no other
        token's NaN is multiplied in.
        """
        if not isinstance(dispatched, _Exchanged):
            raise TypeError(f"dispatched is a {type(dispatched).__name__}, not from {type(self).__name__}.dispatch")
        sums = self._slots.sum(rows, dispatched.local)
        sums = self._ep.all_to_all(sums, dispatched.sent, dispatched.received)
        if not len(sums):  # no token on this rank, or only padding
            return sums.new_zeros(len(dispatched.counted), sums.shape[1])
        index = dispatched.index.clamp(max=len(sums) - 1)  # padding was not sent
        return kernels.unpermute(sums, index, dispatched.counted.to(sums.dtype))

    def _exchange_sizes(self, owner_TK: Tensor, target_TK: Tensor) -> tuple[list[int], list[int], int]:
        """Tokens to send to and to receive from each rank, and the number of rows of this rank's slots."""
        ranks = self._ep.world_size
        both_TK = torch.cat([target_TK, owner_TK + (ranks + 1)], dim=1)  # one count for both
        mine_R2 = slot_load(both_TK, 2 * (ranks + 1)).view(2, ranks + 1).t()[:ranks]
        theirs_R2 = self._ep.all_to_all(mine_R2)
        sizes = torch.cat([mine_R2, theirs_R2], dim=1).tolist()  # the only time the host waits
        return [size[0] for size in sizes], [size[2] for size in sizes], sum(size[3] for size in sizes)


def _first_equal(ids_TK: Tensor) -> Tensor:
    """int64 `[T, K]`: for each id, the first position in its row with the same id."""
    top_k = ids_TK.shape[1]
    from_the_end = torch.arange(top_k, 0, -1, dtype=torch.int32, device=ids_TK.device)
    equal_TKK = ids_TK.unsqueeze(2) == ids_TK.unsqueeze(1)
    return top_k - (equal_TKK * from_the_end).amax(dim=2).long()


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation, int32 `[A]`."""
    places = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return torch.empty_like(order).scatter_(0, order.long(), places)
