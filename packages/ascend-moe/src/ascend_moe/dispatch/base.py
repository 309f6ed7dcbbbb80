# SPDX-License-Identifier: Apache-2.0
"""The interface of dispatchers: `dispatch` sends tokens to the ranks of their experts, `combine` returns and sums the results.

Legend: T tokens of this rank, K experts per token, H hidden, S slots of all ranks, L slots of this rank, A rows of this
rank's slots.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ascend_moe.choose import CommMethod

__all__ = ["Dispatched", "Dispatcher", "check_routed", "without_padding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """Rows for this rank's slots. A dispatcher's own subclass adds what its `combine` needs, so that dispatchers keep no state.

    Attributes:
        rows: `[A, H]`, sorted by slot. Only the first `counts.sum()` rows are written.
        counts: int64 `[L]`, rows of each slot: a grouped matmul's `group_list` of type 1, and the slots' load.
        scales: float32 `[A]` where the rows are int8, else None: row times scale is the token.
    """

    rows: Tensor
    counts: Tensor
    scales: Tensor | None


class Dispatcher(ABC):
    """One communication method. It has no state except its groups, so layers may share it."""

    method: ClassVar[CommMethod]

    @abstractmethod
    def dispatch(
        self, x: Tensor, weights: Tensor, ids: Tensor, *, mask: Tensor | None = None, quantise: bool = False
    ) -> Dispatched:
        """Send tokens to the ranks of their slots. All ranks of the EP group call it together.

        Args:
            x: `[T, H]`. Whether all ranks must have the same tokens, or equally many, depends on the method.
            weights: float32 `[T, K]`, used in `combine`.
            ids: int32 `[T, K]`, physical slots in 0..S-1, no slot twice in a row.
            mask: bool `[T]`, False for padding, which is sent to no expert and not counted. None: all are real.
            quantise: return int8 rows with scales.

        Raises:
            ValueError: a wrong shape, dtype or device.
        """

    @abstractmethod
    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Return the results to their tokens: `[T, H]`, for each token the sum of its experts' rows times their weights.

        Args:
            rows: `[A, H]`, the experts' results in the order of `dispatched.rows`. Its last row may be overwritten.
            dispatched: what `dispatch` of the same dispatcher returned.

        Raises:
            TypeError: `dispatched` is from another dispatcher.
        """


def check_routed(x: Tensor, weights: Tensor, ids: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError unless the four fit each other as `Dispatcher.dispatch` says."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x of {x.dtype} {list(x.shape)} must be a float tensor [tokens, hidden]")
    tokens = x.shape[0]
    if ids.dim() != 2 or ids.shape[0] != tokens or ids.dtype != torch.int32 or ids.device != x.device:
        given = f"{ids.dtype} {list(ids.shape)} on {ids.device}"
        raise ValueError(f"ids of {given} must be torch.int32 [{tokens}, top_k] on {x.device}")
    if weights.shape != ids.shape or weights.dtype != torch.float32 or weights.device != x.device:
        given = f"{weights.dtype} {list(weights.shape)} on {weights.device}"
        raise ValueError(f"weights of {given} must be torch.float32 {list(ids.shape)} on {x.device}")
    if mask is not None and (mask.shape != (tokens,) or mask.dtype != torch.bool or mask.device != x.device):
        given = f"{mask.dtype} {list(mask.shape)} on {mask.device}"
        raise ValueError(f"mask of {given} must be torch.bool [{tokens}] on {x.device}")


def without_padding(ids: Tensor, mask: Tensor | None, num_slots: int) -> Tensor:
    """`ids` with the slot `num_slots` for padding. No rank has that slot, and it sorts after all others."""
    return ids if mask is None else torch.where(mask.unsqueeze(1), ids, num_slots)
