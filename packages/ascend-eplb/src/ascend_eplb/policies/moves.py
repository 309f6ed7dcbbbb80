# SPDX-License-Identifier: Apache-2.0
"""Improvement of a placement in force by one change at a time, in all problems at once.

A change is a *replace* (one slot: a redundant replica gives way to one more replica of an expert of the hottest rank)
or a *swap* (two slots: one of the hottest rank and one of a cold rank). Each round makes the change that lowers the
score, the sum of the 16th powers of the rank loads, most per slot that moves.

Legend: B problems, E experts, R ranks, K slots per rank, C cold ranks, V = C * K slots on them, A active problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.metrics import FloatArray, sum_slots
from ascend_eplb.placement import replica_counts
from ascend_eplb.policies.packing import shares

__all__ = ["MoveRules", "State", "held_experts", "improve"]

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
# The ranks of least load that a change may involve: one of each 8, within these bounds. With fewer the search ends early over hundreds of ranks, and
# more cost time without a gain.
_RANKS_A_COLD_ONE, _LEAST_COLD, _MOST_COLD = 8, 6, 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoveRules:
    """What changes are allowed.

    Args:
        goal_B: peak rank load at which a problem is done.
        budget: most slots moved in one problem.
        cap: most replicas of one expert.
        swaps: whether swaps are allowed.
        pinned_BRK: slots that keep their expert, or None.
    """

    goal_B: FloatArray
    budget: int
    cap: int
    swaps: bool = True
    pinned_BRK: Mask | None = None


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """All problems after a round: slots moved `[B]`, peak rank load `[B]`, experts `[B, R, K]` (int32)."""

    moved_B: Ids
    peak_B: FloatArray
    ids_BRK: NDArray[np.int32]


def held_experts(ids_BRK: NDArray[np.signedinteger], experts: int) -> Mask:
    """bool `[B, R, E]`: whether a rank holds an expert. O(B * R * E)."""
    held_BRE = np.zeros((*ids_BRK.shape[:2], experts), dtype=bool)
    np.put_along_axis(held_BRE, ids_BRK.astype(np.int64), True, axis=2)
    return held_BRE


def improve(load_BE: FloatArray, ids_BRK: Ids, rules: MoveRules) -> list[State]:
    """The states after each round, the first being the start, with ever lower scores and ever more slots moved.

    Complexity: O(budget * B * K * C * K * R).
    """
    ids_BRK = ids_BRK.copy()
    before_BRE = held_experts(ids_BRK, load_BE.shape[1])
    moved_B = np.zeros(len(load_BE), dtype=np.int64)
    states = [State(moved_B.copy(), sum_slots(shares(load_BE, ids_BRK)).max(axis=1), ids_BRK.astype(np.int32))]
    active = np.flatnonzero((states[0].peak_B > rules.goal_B) & (load_BE.sum(axis=1) > 0))
    rounds = 2 * rules.budget if ids_BRK.shape[1] > 1 else 0
    for _ in range(rounds):
        if not len(active):
            break
        left_A = rules.budget - moved_B[active]
        changed_A = _round(load_BE, ids_BRK, active, left_A, rules)
        active = active[changed_A]
        if not len(active):
            break
        stay = np.take_along_axis(before_BRE[active], ids_BRK[active], axis=2)
        moved_B[active] = (~stay).sum(axis=(1, 2))
        peak_B = states[-1].peak_B.copy()
        peak_B[active] = sum_slots(shares(load_BE[active], ids_BRK[active])).max(axis=1)
        states.append(State(moved_B.copy(), peak_B, ids_BRK.astype(np.int32)))
        active = active[(peak_B[active] > rules.goal_B[active]) & (moved_B[active] < rules.budget)]
    return states


def _round(load_BE: FloatArray, ids_BRK: Ids, active: Ids, left_A: Ids, rules: MoveRules) -> Mask:
    """Make the best change of each active problem, in place; bool `[A]`: whether there was one."""
    load_AE, ids_ARK = load_BE[active], ids_BRK[active]
    row_A = np.arange(len(active))
    share_ARK = shares(load_AE, ids_ARK)
    total_AR = sum_slots(share_ARK)
    total_AR /= total_AR.mean(axis=1, keepdims=True)
    hot_A = total_AR.argmax(axis=1)
    ranks = ids_ARK.shape[1]
    cold = min(max(_LEAST_COLD, min(ranks // _RANKS_A_COLD_ONE, _MOST_COLD)), ranks - 1)
    cold_AC = np.argsort(total_AR, axis=1, kind="stable")[:, :cold]
    pinned_ARK = np.zeros(ids_ARK.shape, dtype=bool) if rules.pinned_BRK is None else rules.pinned_BRK[active]
    slots = ids_ARK.shape[2]
    victim_AV = (cold_AC[:, :, None] * slots + np.arange(slots)).reshape(len(active), -1)
    gain_AKV = _replace_gains(load_AE, ids_ARK, total_AR, (hot_A, victim_AV, pinned_ARK), rules.cap)
    gain_AKV[left_A < 1] = -np.inf
    best_A = gain_AKV.reshape(len(active), -1).argmax(axis=1)
    gain_A = gain_AKV.reshape(len(active), -1)[row_A, best_A]
    swap_A = np.zeros(len(active), dtype=bool)
    if rules.swaps:
        swap_gain_AKV = _swap_gains(load_AE, ids_ARK, total_AR, (hot_A, victim_AV, pinned_ARK)) / 2
        swap_gain_AKV[left_A < 2] = -np.inf
        best_swap_A = swap_gain_AKV.reshape(len(active), -1).argmax(axis=1)
        best_swap_gain_A = swap_gain_AKV.reshape(len(active), -1)[row_A, best_swap_A]
        swap_A = best_swap_gain_A > gain_A
        best_A = np.where(swap_A, best_swap_A, best_A)
        gain_A = np.where(swap_A, best_swap_gain_A, gain_A)
    changed_A = gain_A > 1e-9
    hot_slot_A, victim_A = np.divmod(best_A, victim_AV.shape[1])
    rank_A, slot_A = np.divmod(victim_AV[row_A, victim_A], slots)
    hot_expert_A, victim_expert_A = ids_ARK[row_A, hot_A, hot_slot_A], ids_ARK[row_A, rank_A, slot_A]
    ids_BRK[active[changed_A], rank_A[changed_A], slot_A[changed_A]] = hot_expert_A[changed_A]
    both = changed_A & swap_A
    ids_BRK[active[both], hot_A[both], hot_slot_A[both]] = victim_expert_A[both]
    return np.asarray(changed_A)


def _sixteenth_power(value: FloatArray) -> FloatArray:
    """The 16th power."""
    value = value * value
    for _ in range(3):
        value *= value
    return value


def _replace_gains(
    load_AE: FloatArray, ids_ARK: Ids, total_AR: FloatArray, where: tuple[Ids, Ids, Mask], cap: int
) -> FloatArray:
    """`[A, K, V]`: fall of the score when slot v gets one more replica of the hottest rank's k-th expert."""
    hot_A, victim_AV, pinned_ARK = where
    batch, ranks, slots = ids_ARK.shape
    row_A, row_A1 = np.arange(batch), np.arange(batch)[:, None]
    part_AE = load_AE / (load_AE.sum(axis=1, keepdims=True) / ranks)
    count_AE = replica_counts(ids_ARK.reshape(batch, -1), load_AE.shape[1])
    held_ARE = held_experts(ids_ARK, load_AE.shape[1])
    add_AK = ids_ARK[row_A, hot_A]
    add_count_AK = count_AE[row_A1, add_AK]
    new_share_AK = part_AE[row_A1, add_AK] / (add_count_AK + 1)
    less_AK = part_AE[row_A1, add_AK] / add_count_AK - new_share_AK
    less_AKR = np.where(held_ARE[row_A1, :, add_AK], less_AK[:, :, None], 0.0)
    drop_AV = ids_ARK.reshape(batch, -1)[row_A1, victim_AV]
    free_AV = (count_AE[row_A1, drop_AV] > 1) & ~pinned_ARK.reshape(batch, -1)[row_A1, victim_AV]
    row_X, victim_X = np.nonzero(free_AV)  # few: most slots hold the only replica
    drop_X, target_X = drop_AV[row_X, victim_X], victim_AV[row_X, victim_X] // slots
    drop_load_X, drop_count_X = part_AE[row_X, drop_X], count_AE[row_X, drop_X]
    more_X = drop_load_X / (drop_count_X - 1) - drop_load_X / drop_count_X
    after_XR = total_AR[row_X] + np.where(held_ARE[row_X, :, drop_X], more_X[:, None], 0.0)
    number_X = np.arange(len(row_X))
    after_XR[number_X, target_X] = total_AR[row_X, target_X] - drop_load_X / drop_count_X
    after_XKR = after_XR[:, None] - less_AKR[row_X]
    after_XKR[number_X, :, target_X] += new_share_AK[row_X]
    gain_XK = _sixteenth_power(total_AR).sum(axis=1)[row_X, None] - _sixteenth_power(after_XKR).sum(axis=2)
    allowed_XK = ~held_ARE[row_X[:, None], target_X[:, None], add_AK[row_X]] & (add_count_AK < cap)[row_X]
    gain_AKV = np.full((batch, slots, victim_AV.shape[1]), -np.inf)
    gain_AKV[row_X, :, victim_X] = np.where(allowed_XK, gain_XK, -np.inf)
    return gain_AKV


def _swap_gains(load_AE: FloatArray, ids_ARK: Ids, total_AR: FloatArray, where: tuple[Ids, Ids, Mask]) -> FloatArray:
    """`[A, K, V]`: fall of the score when the hottest rank's k-th slot is swapped with slot v."""
    hot_A, victim_AV, pinned_ARK = where
    batch, ranks, slots = ids_ARK.shape
    row_A, row_A1 = np.arange(batch), np.arange(batch)[:, None]
    share_ARK = shares(load_AE, ids_ARK)
    share_ARK = share_ARK / (share_ARK.sum(axis=(1, 2), keepdims=True) / ranks)
    held_ARE = held_experts(ids_ARK, load_AE.shape[1])
    target_AV = victim_AV // slots
    mine_AK, theirs_AV = ids_ARK[row_A, hot_A], ids_ARK.reshape(batch, -1)[row_A1, victim_AV]
    delta_AKV = share_ARK[row_A, hot_A][:, :, None] - share_ARK.reshape(batch, -1)[row_A1, victim_AV][:, None]
    hot_A11 = total_AR[row_A, hot_A][:, None, None]
    cold_A1V = total_AR[row_A1, target_AV][:, None]
    gain_AKV = (
        _sixteenth_power(hot_A11)
        + _sixteenth_power(cold_A1V)
        - _sixteenth_power(hot_A11 - delta_AKV)
        - _sixteenth_power(cold_A1V + delta_AKV)
    )
    lacks_AKV = ~held_ARE[row_A1[:, :, None], target_AV[:, None], mine_AK[:, :, None]]
    lacks_AKV &= ~held_ARE[row_A1, hot_A[:, None], theirs_AV][:, None]
    pinned_AV = pinned_ARK.reshape(batch, -1)[row_A1, victim_AV]
    allowed = lacks_AKV & ~pinned_AV[:, None] & ~pinned_ARK[row_A, hot_A][:, :, None]
    return np.where(allowed, gain_AKV, -np.inf)
