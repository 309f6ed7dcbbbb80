# SPDX-License-Identifier: Apache-2.0
"""MC2: fused kernels that communicate through buffers of a fixed size. The host does not wait for the device."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ascend_moe import kernels
from ascend_moe.choose import CommMethod, Soc
from ascend_moe.dispatch.base import Dispatched, Dispatcher, check_routed
from ascend_moe.env import MoeEnv

__all__ = ["Mc2Dispatcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent(Dispatched):
    weights: Tensor
    ids: Tensor
    mask: Tensor | None
    kernel: kernels.SentRows


class Mc2Dispatcher(Dispatcher):
    """The ranks have different tokens, equally many and at least one; padding comes after the real tokens.

    Raises:
        ValueError: `env.mc2` is None.
        RuntimeError: `env.mc2` has one rank, or does not run over HCCL.
    """

    method = CommMethod.MC2

    def __init__(self, env: MoeEnv) -> None:
        """Store the kernels' arguments. Asking for the communicator's name creates the communicator."""
        if env.mc2 is None:
            raise ValueError("mc2=None must be a communicator of its own for MC2's kernels, over the ranks of ep")
        name = env.mc2.comm_name()
        self._soc = env.soc
        self._group: dict[str, Any] = {
            "group_ep": name,
            "ep_world_size": env.ep.world_size,
            "ep_rank_id": env.ep.rank_in_group,
            "moe_expert_num": env.num_slots,
            "global_bs": 0,
            "expert_shard_type": 0,
            "shared_expert_rank_num": 0,
        }
        if env.soc is not Soc.A2:
            self._group |= {"group_tp": name, "tp_world_size": 1, "tp_rank_id": 0}

    def dispatch(
        self, x: Tensor, weights: Tensor, ids: Tensor, *, mask: Tensor | None = None, quantise: bool = False
    ) -> Dispatched:
        """See `Dispatcher`. A is T * EP ranks * min(L, K), however many rows are written.

        Raises:
            ValueError: there is no token.
        """
        check_routed(x, weights, ids, mask)
        if not len(x):
            raise ValueError("x has no token: MC2 needs as many on all ranks, at least one (a masked one, if need be)")
        options: dict[str, Any] = {"x_active_mask": mask}
        if self._soc is Soc.A2:
            options["expert_scales"] = weights
        sent = kernels.mc2_dispatch(x, ids, self._group, quantise=quantise, **options)
        return _Sent(
            rows=sent.rows,
            counts=sent.counts,
            scales=sent.scales if quantise else None,
            weights=weights,
            ids=ids,
            mask=mask,
            kernel=sent,
        )

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """See `Dispatcher`. The result is complete; that of padding is undefined."""
        if not isinstance(dispatched, _Sent):
            raise TypeError(f"dispatched is a {type(dispatched).__name__}, not from {type(self).__name__}.dispatch")
        sent = dispatched.kernel
        options: dict[str, Any] = {"x_active_mask": dispatched.mask}
        if self._soc is Soc.A2:  # on A2 dispatch has sent the weights
            options["expand_scales"] = sent.expand_scales
        return kernels.mc2_combine(rows, dispatched.ids, dispatched.weights, sent, self._group, **options)
