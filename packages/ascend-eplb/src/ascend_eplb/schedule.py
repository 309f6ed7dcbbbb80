# SPDX-License-Identifier: Apache-2.0
"""Transfers in batches that fit the staging buffers, and a check of their outcome by execution.

Within a batch every rank first reads what it sends, then writes what it received; batches run one after the other. A
slot must therefore not be overwritten before the batch that last reads it. As a graph whose edges lead from slot to
slot, a layer's transfers are cycles with trees attached: trees are placed leaves first, and a cycle that does not fit
one batch is shortened by exchanging two of its slots at a time.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from ascend_eplb.migrate import TransferPlan
from ascend_eplb.placement import Placement

__all__ = ["transfer_batches", "verify_transfers"]

Slot = tuple[int, int]
Move = tuple[int, int, int, int, int, int]


def transfer_batches(plan: TransferPlan, *, send: int, receive: int) -> list[TransferPlan]:
    """Cut a plan into batches in which no rank sends more than `send` or receives more than `receive` experts.

    Copies within a rank take no buffer. Cycles too long for a batch cost transfers beyond the plan's (one for each
    exchange); sources are then the contents before the *batch*.

    Args:
        plan: from `transfer_plan`.
        send: experts that a rank can send at once, >= 1.
        receive: experts that a rank can receive at once, >= 1.

    Raises:
        ValueError: a buffer below 1.

    Complexity: O(M * B) for M transfers and B batches in the worst case, near O(M) as a rule.

    Source: the parallel assignment problem of compilers, with limits on how much moves at once.
    """
    if send < 1 or receive < 1:
        raise ValueError(f"send={send} and receive={receive} must be at least 1")
    batches = _Batches(send, receive)
    columns = (plan.layer, plan.expert, plan.source_rank, plan.source_slot, plan.target_rank, plan.target_slot)
    by_layer: dict[int, list[Move]] = defaultdict(list)
    for move in zip(*(column.tolist() for column in columns), strict=True):
        by_layer[move[0]].append(move)
    for moves in by_layer.values():
        _schedule_layer(moves, batches)
    return [_as_plan(moves, plan.ranks_per_node) for moves in batches.batches]


def verify_transfers(old: Placement, new: Placement, batches: TransferPlan | list[TransferPlan]) -> None:
    """Execute transfers on an array of expert ids and compare the outcome with `new`.

    Raises:
        ValueError: a transfer sends another expert than it says, two write one slot in a batch, or the outcome is not
            `new`; names batch, layer, rank and slot.

    Complexity: O(M + L * S).

    Source: execution.
    """
    state = old.physical_to_logical.copy()
    for number, batch in enumerate([batches] if isinstance(batches, TransferPlan) else batches):
        sent = state[batch.layer, batch.source_rank, batch.source_slot]
        wrong = np.flatnonzero(sent != batch.expert)
        if len(wrong):
            at = wrong[0]
            place = f"layer {batch.layer[at]}, rank {batch.source_rank[at]}, slot {batch.source_slot[at]}"
            raise ValueError(f"batch {number}: {place} holds expert {sent[at]}, not {batch.expert[at]}")
        targets = np.stack([batch.layer, batch.target_rank, batch.target_slot])
        if np.unique(targets, axis=1).shape[1] != targets.shape[1]:
            raise ValueError(f"batch {number}: two transfers write the same slot")
        state[batch.layer, batch.target_rank, batch.target_slot] = sent
    wrong_LRK = state != new.physical_to_logical
    if wrong_LRK.any():
        layer, rank, slot = np.argwhere(wrong_LRK)[0]
        found, wanted = state[layer, rank, slot], new.physical_to_logical[layer, rank, slot]
        raise ValueError(f"layer {layer}, rank {rank}, slot {slot} ends with expert {found}, not {wanted}")


class _Batches:
    """The batches so far, and how much of the buffers of each is used."""

    def __init__(self, send: int, receive: int) -> None:
        self.limits = (send, receive)
        self.batches: list[list[Move]] = []
        self.used: list[dict[tuple[int, int], int]] = []

    def place(self, moves: list[Move], earliest: int) -> int:
        """Put moves that belong together in the first batch from `earliest` with room; return its number."""
        needs: dict[tuple[int, int], int] = defaultdict(int)
        for move in moves:
            if move[2] != move[4]:
                needs[0, move[2]] += 1
                needs[1, move[4]] += 1
        number = earliest
        while not self.fits(needs, number):
            number += 1
        while len(self.batches) <= number:
            self.batches.append([])
            self.used.append(defaultdict(int))
        self.batches[number] += moves
        for key, amount in needs.items():
            self.used[number][key] += amount
        return number

    def fits(self, needs: dict[tuple[int, int], int], number: int) -> bool:
        """Whether a batch has this much room; one that does not exist yet is empty."""
        used = self.used[number] if number < len(self.used) else {}
        return all(used.get(key, 0) + amount <= self.limits[key[0]] for key, amount in needs.items())

    def fits_at_all(self, moves: list[Move]) -> bool:
        """Whether an empty batch has room for these moves together."""
        sends: dict[int, int] = defaultdict(int)
        receives: dict[int, int] = defaultdict(int)
        for move in moves:
            if move[2] != move[4]:
                sends[move[2]] += 1
                receives[move[4]] += 1
        return max(sends.values(), default=0) <= self.limits[0] and max(receives.values(), default=0) <= self.limits[1]


def _schedule_layer(moves: list[Move], batches: _Batches) -> None:
    """Place the transfers of one layer: trees leaves first, then cycles."""
    into: dict[Slot, Move] = {(move[4], move[5]): move for move in moves}
    readers: dict[Slot, int] = defaultdict(int)
    for move in moves:
        readers[move[2], move[3]] += 1
    last_read: dict[Slot, int] = defaultdict(int)
    ready = [slot for slot in into if not readers[slot]]
    while ready:
        slot = ready.pop()
        move = into.pop(slot)
        number = batches.place([move], last_read[slot])
        source = (move[2], move[3])
        last_read[source] = max(last_read[source], number)
        readers[source] -= 1
        if not readers[source] and source in into:
            ready.append(source)
    while into:
        slot, move = next(iter(into.items()))
        cycle = []
        while slot in into:
            move = into.pop(slot)
            cycle.append(move)
            slot = (move[2], move[3])
        earliest = max(last_read[move[4], move[5]] for move in cycle)
        _schedule_cycle(cycle, batches, earliest)


def _schedule_cycle(cycle: list[Move], batches: _Batches, earliest: int) -> None:
    """Place a cycle (each move's source is the next one's target), exchanging two slots while it is too long."""
    while not batches.fits_at_all(cycle):
        first, second = cycle[0], cycle[1]
        layer = first[0]
        kept = cycle[-1][1]
        back = (layer, kept, first[4], first[5], first[2], first[3])
        earliest = 1 + batches.place([first, back], earliest)
        last = cycle[-1]
        cycle = [second, *cycle[2:-1], (layer, kept, first[2], first[3], last[4], last[5])]
    batches.place(cycle, earliest)


def _as_plan(moves: list[Move], ranks_per_node: int) -> TransferPlan:
    table = np.array(moves, dtype=np.int32).reshape(-1, 6).T
    return TransferPlan(
        layer=table[0], expert=table[1], source_rank=table[2], source_slot=table[3], target_rank=table[4],
        target_slot=table[5], ranks_per_node=ranks_per_node,
    )  # fmt: skip
