# SPDX-License-Identifier: Apache-2.0
"""From recorded load to a `RebalanceDecision`: which experts move, in which order, or why none does. NumPy and ascend-eplb alone.

Legend: T intervals, M MoE layers, E experts, R ranks, K slots of a rank, N transfers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from ascend_eplb import (
    Placement,
    Policy,
    Problem,
    TransferPlan,
    balancedness,
    decayed_load,
    mean_load,
    peak_load,
    rank_loads,
    solve,
    transfer_batches,
    transfer_plan,
    verify_transfers,
)
from numpy.typing import NDArray

from vllm_ascend.eplb.options import POLICIES, WEIGHTINGS

__all__ = ["COLUMNS", "RebalanceDecision", "Rules", "decide", "placement_after"]

COLUMNS = ("batch", "layer", "expert", "source_rank", "source_slot", "target_rank", "target_slot")
# The part of a step that the experts of a MoE model take, for the prediction of what a better balance saves.
EXPERT_SHARE = 0.25
_HALF_LIFE = 1.0  # intervals
_LIMITED = ("incremental", "swift")  # policies with a limit of moves
_PARTS = (1, 2, 4)  # the parts of the limit that are tried one after the other
_NO_TRANSFERS = np.zeros((0, len(COLUMNS)), np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How to plan.

    Args:
        policy: one of `options.POLICIES`. "random" exchanges experts at random, for tests: its plans are never dropped for their cost.
        weighting: one of `options.WEIGHTINGS`: how the intervals of a window become one load.
        max_moves: the most slots that may get new weights in one plan, over all layers ("incremental" and "swift").
        buffer_experts: experts that a rank sends, and receives, in one batch.
        expert_bytes: of all tensors of an expert, in one layer.
        horizon_steps: steps during which the plan is expected to serve.
        seed: of "random".
    """

    policy: str
    weighting: str
    max_moves: int
    buffer_experts: int
    expert_bytes: int
    horizon_steps: int
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RebalanceDecision:
    """What to do.

    Args:
        transfers: int32 `[N, 7]`, columns as in `COLUMNS`; empty: nothing moves. Batches are numbered from 0, and each concerns one layer. The
            sources of a batch mean the contents before it.
        reason: why nothing moves; "" where something does.
        before: balancedness of the placement in force for the load, averaged over the layers.
        after: that of the placement after all transfers.
        saved_seconds: predicted, over the steps during which the plan serves.
        cost_seconds: predicted, for the transfers.
    """

    transfers: NDArray[np.int32] = field(default_factory=_NO_TRANSFERS.copy)
    reason: str = ""
    before: float = 1.0
    after: float = 1.0
    saved_seconds: float = 0.0
    cost_seconds: float = 0.0


def decide(
    placed: Placement,
    history: NDArray[np.float64],
    rules: Rules,
    *,
    step_seconds: float,
    seconds_per_byte: float,
) -> RebalanceDecision:
    """Plan for the load of a window of intervals.

    A plan that does not repay its bytes is made again with half and with a quarter of the moves, where the policy has a limit of them: the first moves
    gain the most. The last one is dropped unless what it saves repays what it costs:

        saved = horizon_steps * step_seconds * EXPERT_SHARE * (1 - before / after)
        cost  = seconds_per_byte * expert_bytes * the most experts that one rank sends or receives

    where before and after are the balancedness of the two placements. The experts of a layer end when the fullest rank ends, whose load is the mean
    load divided by the balancedness.

    Args:
        placed: the placement in force, of M layers.
        history: `[T, M, E]`, tokens.
        rules: how to plan.
        step_seconds: of a step, measured.
        seconds_per_byte: of a transfer, measured.

    Raises:
        ValueError: loads or rules that do not fit the placement, or a policy or weighting that does not exist.
    """
    load = _weighted(history, rules.weighting)
    before = float(balancedness(placed, load).mean())
    if not load.any():
        return RebalanceDecision(reason="no load", before=before, after=before)
    limits = [rules.max_moves // part for part in _PARTS] if rules.policy in _LIMITED else [rules.max_moves]
    for max_moves in limits:
        wanted = _planned(placed, load, replace(rules, max_moves=max_moves))
        placement, transfers = _batched(placed, wanted, load, rules.buffer_experts)
        after = float(balancedness(placement, load).mean())
        if not len(transfers):
            return RebalanceDecision(reason="nothing to move", before=before, after=after)
        saved = rules.horizon_steps * step_seconds * EXPERT_SHARE * (1.0 - before / after)
        cost = seconds_per_byte * rules.expert_bytes * _busiest(transfers, placed.ranks)
        found = RebalanceDecision(transfers=transfers, before=before, after=after, saved_seconds=saved, cost_seconds=cost)  # fmt: skip
        if rules.policy == "random" or saved > cost:
            return found
    return replace(found, transfers=_NO_TRANSFERS.copy(), reason="does not repay its bytes")


def placement_after(placed: Placement, transfers: NDArray[np.int32]) -> Placement:
    """The placement after all batches, each of which must leave a placement.

    Raises:
        ValueError: a transfer that names what does not exist, sends another expert than it says, or leaves an expert without a slot, or with two
            slots on one rank.
    """
    ids = placed.physical_to_logical.copy()
    limits = np.array([2**31 - 1, placed.layers, placed.num_experts, *(placed.ranks, placed.slots_per_rank) * 2])
    if transfers.ndim != 2 or transfers.shape[1] != len(COLUMNS):
        raise ValueError(f"transfers have shape {transfers.shape}, must be [N, {len(COLUMNS)}]")
    if ((transfers < 0) | (transfers >= limits)).any():
        row, column = np.argwhere((transfers < 0) | (transfers >= limits))[0]
        raise ValueError(
            f"transfer {row}: {COLUMNS[column]} is {transfers[row, column]}, must be below {limits[column]}"
        )
    for number in np.unique(transfers[:, 0]):
        batch = transfers[transfers[:, 0] == number]
        layers = np.unique(batch[:, 1])
        if len(layers) != 1:
            raise ValueError(f"batch {number} concerns the layers {layers.tolist()}, must concern one")
        ids[layers[0]] = _after_batch(ids[layers[0]], batch, placed.num_experts)
    return Placement(ids, placed.num_experts, placed.layer_ids)


def _after_batch(ids: NDArray[np.int32], batch: NDArray[np.int32], num_experts: int) -> NDArray[np.int32]:
    """The slots `[R, K]` of a layer after a batch; ValueError as of `placement_after`."""
    number, layer = batch[0, :2]
    sent = ids[batch[:, 3], batch[:, 4]]
    wrong = np.flatnonzero(sent != batch[:, 2])
    if len(wrong):
        _, _, expert, rank, slot, *_ = batch[wrong[0]]
        raise ValueError(
            f"batch {number}: slot {slot} of rank {rank} in layer {layer} holds expert {sent[wrong[0]]}, not {expert}"
        )
    if len(np.unique(batch[:, 5:], axis=0)) != len(batch):
        raise ValueError(f"batch {number}: two transfers have one slot as their target")
    after = ids.copy()
    after[batch[:, 5], batch[:, 6]] = sent
    try:
        Placement(after[None], num_experts)
    except ValueError as error:
        raise ValueError(f"batch {number} leaves no placement of layer {layer}: {error}") from None
    return after


def _weighted(history: NDArray[np.float64], weighting: str) -> NDArray[np.float64]:
    """One load `[M, E]` from a window."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r} must be one of {', '.join(WEIGHTINGS)}")
    if weighting == "decayed":
        return decayed_load(history, _HALF_LIFE)
    return mean_load(history) if weighting == "mean" else peak_load(history)


def _planned(placed: Placement, load: NDArray[np.float64], rules: Rules) -> Placement:
    """What the policy wants, with slots aligned with those in force."""
    if rules.policy not in POLICIES:
        raise ValueError(f"policy={rules.policy!r} must be one of {', '.join(POLICIES)}")
    limits: Mapping[str, int] = MappingProxyType({})
    if rules.policy in _LIMITED:
        limits = {"max_moves": rules.max_moves}
    policy: str | Policy = rules.policy
    if rules.policy == "random":
        generator = np.random.default_rng(rules.seed)

        def exchange_experts(problem: Problem) -> Placement:
            names = np.argsort(generator.random((placed.layers, placed.num_experts)), axis=1).astype(np.int32)
            ids = np.take_along_axis(names[:, None], placed.physical_to_logical, axis=2)
            return Placement(ids, placed.num_experts, placed.layer_ids)

        policy = exchange_experts
    problem = Problem(load=load, ranks=placed.ranks, slots=placed.slots, previous=placed, **limits)
    return solve(problem, policy).placement


def _batched(
    placed: Placement, wanted: Placement, load: NDArray[np.float64], buffer_experts: int
) -> tuple[Placement, NDArray[np.int32]]:
    """The placement that is reached and its transfers, the layers that gain most first.

    A layer stays as it is where its exchange cannot be cut into batches of which each leaves a placement (several slots of one rank in one cycle,
    longer than the buffers).
    """
    wanted = _with_short_cycles(placed, wanted)
    whole = transfer_plan(placed, wanted)
    gain = rank_loads(placed, load).max(axis=1) - rank_loads(wanted, load).max(axis=1)
    ids, found, first = placed.physical_to_logical.copy(), [_NO_TRANSFERS], 0
    for layer in sorted(np.unique(whole.layer).tolist(), key=lambda one: (-gain[one], one)):
        batches = transfer_batches(
            whole.select(np.flatnonzero(whole.layer == layer)), send=buffer_experts, receive=buffer_experts
        )
        table = np.concatenate([_as_table(batch, first + number) for number, batch in enumerate(batches)])
        try:
            if (table[:, 3] == table[:, 5]).any():
                raise ValueError("a copy within a rank")
            placement_after(placed, table)
        except ValueError:
            continue
        found.append(table)
        first += len(batches)
        ids[layer] = wanted.physical_to_logical[layer]
    reached = Placement(ids, placed.num_experts, placed.layer_ids)
    transfers = np.concatenate(found)
    verify_transfers(placed, reached, [_as_plan(transfers[transfers[:, 0] == number]) for number in range(first)])
    return reached, transfers


def _with_short_cycles(placed: Placement, wanted: Placement) -> Placement:
    """`wanted` with other slots for what each rank receives: two ranks that send each other an expert exchange two slots, where they can.

    Then what two ranks exchange fits the smallest buffers, and needs no copies within a rank.
    """
    plan, ids = transfer_plan(placed, wanted), placed.physical_to_logical.copy()
    for layer in np.unique(plan.layer).tolist():
        rows = plan.select(np.flatnonzero(plan.layer == layer))
        columns = (rows.expert, rows.source_rank, rows.source_slot, rows.target_rank, rows.target_slot)
        moves: list[tuple[int, ...]] = list(zip(*(column.tolist() for column in columns), strict=True))
        free = {move[3:] for move in moves}  # the slots that get another expert
        between: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
        rest: list[tuple[int, ...]] = []
        for move in moves:
            (between[move[1], move[3]] if move[1:3] in free else rest).append(move)
        for (source, target), there in between.items():
            back = between.get((target, source), []) if source < target else []
            while there and back:
                one, other = there[-1], back[-1]
                if one[1:3] not in free or other[1:3] not in free:  # a source that several ranks receive is in one pair
                    rest.append((there if one[1:3] not in free else back).pop())
                    continue
                ids[(layer, *other[1:3])], ids[(layer, *one[1:3])] = one[0], other[0]
                free -= {one[1:3], other[1:3]}
                there.pop()
                back.pop()
        rest += [move for moves_between in between.values() for move in moves_between]
        left = {rank: sorted(slot for holder, slot in free if holder == rank) for rank in range(placed.ranks)}
        for expert, _, _, target, _ in rest:
            ids[layer, target, left[target].pop(0)] = expert
    return Placement(ids, placed.num_experts, placed.layer_ids)


def _as_table(batch: TransferPlan, number: int) -> NDArray[np.int32]:
    columns = [getattr(batch, name) for name in COLUMNS[1:]]
    return np.stack([np.full(len(batch), number, np.int32), *columns], axis=1)


def _as_plan(table: NDArray[np.int32]) -> TransferPlan:
    columns = {name: table[:, column] for column, name in enumerate(COLUMNS) if column}
    return TransferPlan(**columns, ranks_per_node=1)


def _busiest(transfers: NDArray[np.int32], ranks: int) -> int:
    """Experts that one rank sends or receives, the most."""
    counts = (np.bincount(transfers[:, column], minlength=ranks).max() for column in (3, 5))
    return int(max(counts))
