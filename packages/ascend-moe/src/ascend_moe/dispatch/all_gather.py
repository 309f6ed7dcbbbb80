# SPDX-License-Identifier: Apache-2.0
"""All ranks have the same tokens; each computes its own slots' share. `prepare.py` gathers the tokens; this file sends nothing."""

from dataclasses import dataclass

from torch import Tensor

from ascend_moe.choose import CommMethod
from ascend_moe.dispatch.base import Dispatched, Dispatcher, check_routed, without_padding
from ascend_moe.dispatch.local import LocalRows, LocalSlots
from ascend_moe.env import MoeEnv

__all__ = ["AllGatherDispatcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gathered(Dispatched):
    local: LocalRows


class AllGatherDispatcher(Dispatcher):
    """Every rank of the EP group calls with the same tokens, weights and ids, and gets the sum over its own slots.

    Ids must not depend on the rank. If ranks chose different replicas for one token, its expert would be computed twice, or
    on no rank.
    """

    method = CommMethod.ALL_GATHER

    def __init__(self, env: MoeEnv) -> None:
        """Store the range of this rank's slots."""
        self._num_slots = env.num_slots
        self._slots = LocalSlots(env)

    def dispatch(
        self, x: Tensor, weights: Tensor, ids: Tensor, *, mask: Tensor | None = None, quantise: bool = False
    ) -> Dispatched:
        """See `Dispatcher`. A is T * K; how many of these rows are written is known on the device only."""
        check_routed(x, weights, ids, mask)
        local = self._slots.sort(
            x, weights, without_padding(ids, mask, self._num_slots), padded=mask is not None, quantise=quantise
        )
        return _Gathered(rows=local.rows, counts=local.counts, scales=local.scales, local=local)

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher`. The result is this rank's share: the ranks' shares have to be summed."""
        if not isinstance(dispatched, _Gathered):
            raise TypeError(f"dispatched is a {type(dispatched).__name__}, not from {type(self).__name__}.dispatch")
        return self._slots.sum(rows, dispatched.local)
