# SPDX-License-Identifier: Apache-2.0
"""Taking apart replicas of one expert that share a rank, which no expert map can express.

Legend: B independent problems (layers, or layers x nodes), R ranks, K slots per rank, E logical experts, D problems
at hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray
from ascend_eplb.placement import replica_counts

__all__ = ["duplicate_slots", "repair_duplicates"]


def duplicate_slots(ids_BRK: NDArray[Any]) -> NDArray[np.bool_]:
    """bool `[B, R, K]`: slots whose expert is in an earlier slot of the same rank. O(B * S * K)."""
    slots = ids_BRK.shape[2]
    twice = np.zeros(ids_BRK.shape, dtype=bool)
    for shift in range(1, slots):
        twice[:, :, shift:] |= ids_BRK[:, :, shift:] == ids_BRK[:, :, :-shift]
    return twice


def repair_duplicates(ids_BRK: NDArray[Any], load_BE: FloatArray) -> NDArray[Any]:
    """The same assignment without duplicates: swapped with another rank where possible, else replaced.

    A swap keeps the replica counts and takes the partner that leaves the lower of the two rank loads; where no partner
    is left (every other rank holds the expert too), the duplicate gives way to the expert, of those placed in the
    problem, with the greatest load per replica that the rank lacks. K must not exceed the number of those.

    Complexity: O(S * K) and O(S) per duplicate, all problems at once.
    """
    fixed_BRK = np.array(ids_BRK)
    active = np.arange(len(fixed_BRK))
    while True:
        twice = duplicate_slots(fixed_BRK[active])
        broken = twice.any(axis=(1, 2))
        active = active[broken]
        if not len(active):
            return fixed_BRK
        first_D = twice[broken].reshape(len(active), -1).argmax(axis=1)
        fixed_BRK[active] = _repair_one(fixed_BRK[active], load_BE[active], first_D)


def _repair_one(ids_DRK: NDArray[Any], load_DE: FloatArray, slot_D: NDArray[np.int64]) -> NDArray[Any]:
    """Take away the duplicate in flat slot `slot_D` of each problem."""
    batch, _, slots = ids_DRK.shape
    row_D, rank_D = np.arange(batch), slot_D // slots
    ids_DS = ids_DRK.reshape(batch, -1)
    count_DE = replica_counts(ids_DS, load_DE.shape[1])
    average_DE = load_DE / np.maximum(count_DE, 1)
    share_DRK = np.take_along_axis(average_DE, ids_DS, axis=1).reshape(ids_DRK.shape)
    total_DR = share_DRK.sum(axis=2)
    expert_D, share_D = ids_DS[row_D, slot_D], share_DRK.reshape(batch, -1)[row_D, slot_D]
    here_DE = np.zeros(load_DE.shape, dtype=bool)
    np.put_along_axis(here_DE, ids_DRK[row_D, rank_D], True, axis=1)
    has_it_DR = (ids_DRK == expert_D[:, None, None]).any(axis=2)
    possible_DRK = ~(has_it_DR[:, :, None] | np.take_along_axis(here_DE, ids_DS, axis=1).reshape(ids_DRK.shape))
    gain_DRK = share_DRK - share_D[:, None, None]
    higher_DRK = np.maximum(total_DR[row_D, rank_D][:, None, None] + gain_DRK, total_DR[:, :, None] - gain_DRK)
    partner_D = np.where(possible_DRK, higher_DRK, np.inf).reshape(batch, -1).argmin(axis=1)
    swappable_D = possible_DRK.any(axis=(1, 2))
    row, slot, partner = row_D[swappable_D], slot_D[swappable_D], partner_D[swappable_D]
    ids_DS[row, slot], ids_DS[row, partner] = ids_DS[row, partner], ids_DS[row, slot]
    stuck = row_D[~swappable_D]
    hottest = np.where(here_DE | (count_DE == 0), -1.0, average_DE)[stuck].argmax(axis=1)
    ids_DS[stuck, slot_D[stuck]] = hottest
    return ids_DS.reshape(ids_DRK.shape)
