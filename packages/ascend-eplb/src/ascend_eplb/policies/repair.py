# SPDX-License-Identifier: Apache-2.0
"""Repair of placements in which replicas of one expert share a rank, which no expert map can express.

Legend: B independent problems (layers, or layers x nodes), R ranks, K slots per rank, E logical experts, D problems
that still have duplicates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray, sum_slots

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

    Complexity: O(S log K), and O(S) per duplicate, all problems at once.
    """
    fixed_BRK = np.array(ids_BRK)
    ordered_BRK = np.sort(fixed_BRK.astype(np.int32), axis=2)
    repeated = ordered_BRK[:, :, 1:] == ordered_BRK[:, :, :-1]
    active = np.flatnonzero(repeated.reshape(len(fixed_BRK), -1).any(axis=1))
    while len(active):
        twice = duplicate_slots(fixed_BRK[active]).reshape(len(active), -1)
        first_D = twice.argmax(axis=1)
        broken = twice[np.arange(len(active)), first_D]
        active, first_D = active[broken], first_D[broken]
        if len(active):
            fixed_BRK[active] = _repair_one(fixed_BRK[active], load_BE[active], first_D)
    return fixed_BRK


def _repair_one(ids_DRK: NDArray[Any], load_DE: FloatArray, slot_D: NDArray[np.int64]) -> NDArray[Any]:
    """Replace the duplicate in flat slot `slot_D` of each problem, by a swap or by another expert."""
    batch, ranks, slots = ids_DRK.shape
    experts = load_DE.shape[1]
    row_D, rank_D = np.arange(batch), slot_D // slots
    ids_DS = ids_DRK.reshape(batch, -1)
    keys_DS = ids_DS + row_D[:, None] * experts
    count_DE = np.bincount(keys_DS.ravel(), minlength=batch * experts).reshape(batch, experts)
    average_DE = load_DE / np.maximum(count_DE, 1)
    share_DS = average_DE.ravel()[keys_DS]
    total_DR = sum_slots(share_DS.reshape(ids_DRK.shape))
    expert_D, share_D = ids_DS[row_D, slot_D], share_DS[row_D, slot_D]
    here_DE = np.zeros(load_DE.shape, dtype=bool)
    here_DE[row_D[:, None], ids_DRK[row_D, rank_D]] = True
    has_it_DR = np.zeros((batch, ranks), dtype=bool)
    has_it_DR.ravel()[np.flatnonzero(ids_DS == expert_D[:, None]) // slots] = True
    barred_DS = here_DE.ravel()[keys_DS]
    barred_DS.reshape(ids_DRK.shape)[has_it_DR] = True
    gain_DS = share_DS - share_D[:, None]
    other_DS = np.repeat(total_DR.ravel(), slots).reshape(batch, -1) - gain_DS
    higher_DS = np.maximum(total_DR[row_D, rank_D][:, None] + gain_DS, other_DS)
    higher_DS[barred_DS] = np.inf
    partner_D = higher_DS.argmin(axis=1)
    swappable_D = ~barred_DS[row_D, partner_D]
    row, slot, partner = row_D[swappable_D], slot_D[swappable_D], partner_D[swappable_D]
    ids_DS[row, slot], ids_DS[row, partner] = ids_DS[row, partner], ids_DS[row, slot]
    stuck = row_D[~swappable_D]
    hottest = np.where(here_DE[stuck] | (count_DE[stuck] == 0), -1.0, average_DE[stuck]).argmax(axis=1)
    ids_DS[stuck, slot_D[stuck]] = hottest
    return ids_DS.reshape(ids_DRK.shape)
