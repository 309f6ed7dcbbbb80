# SPDX-License-Identifier: Apache-2.0
"""The decision which experts move: plans that can be carried out batch by batch, and plans that are dropped."""

import numpy as np
import pytest
from ascend_eplb import Placement, balancedness, spread
from vllm_ascend.eplb.decide import EXPERT_SHARE, Rules, decide, placement_after
from vllm_ascend.eplb.options import POLICIES, WEIGHTINGS

RULES = Rules(
    policy="incremental", weighting="mean", max_moves=1000, buffer_experts=2, expert_bytes=100, horizon_steps=10
)
FREE = {"step_seconds": 1.0, "seconds_per_byte": 0.0}


def changed(**values):
    from dataclasses import replace

    return replace(RULES, **values)


def problem(seed, layers=3, experts=16, ranks=4, redundant=4):
    load = np.random.default_rng(seed).lognormal(0, 1, (2, layers, experts)) * 100
    return spread(num_experts=experts, ranks=ranks, redundant=redundant, layers=layers), load


def after_batches(ids, transfers, buffer):
    """By hand: every batch reads first and writes then, within the buffers of each rank, and leaves all experts, at most one on a rank."""
    ids = ids.copy()
    for number in range(transfers[:, 0].max() + 1):
        batch = transfers[transfers[:, 0] == number]
        assert len(batch)
        assert len(set(batch[:, 1])) == 1
        for column in (3, 5):
            assert max(np.bincount(batch[:, column])) <= buffer
        sent = [ids[layer, rank, slot] for _, layer, _, rank, slot, _, _ in batch]
        assert sent == batch[:, 2].tolist()
        for expert, (_, layer, _, source, _, rank, slot) in zip(sent, batch, strict=True):
            assert source != rank
            ids[layer, rank, slot] = expert
        layer = ids[batch[0, 1]]
        assert set(layer.ravel()) == set(range(layer.max() + 1))
        assert all(len(set(rank)) == len(rank) for rank in layer)
    return ids


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("buffer", [1, 2, 5])
def test_a_plan_can_be_carried_out_batch_by_batch(policy, buffer):
    for seed in range(6):
        placed, load = problem(seed)
        found = decide(placed, load, changed(policy=policy, buffer_experts=buffer, seed=seed), **FREE)
        assert found.reason in ("", "nothing to move", "does not repay its bytes")
        if found.reason:
            continue
        ids = after_batches(placed.physical_to_logical, found.transfers, buffer)
        reached = placement_after(placed, found.transfers)
        assert np.array_equal(reached.physical_to_logical, ids)
        assert found.before == pytest.approx(balancedness(placed, load.mean(axis=0)).mean())
        assert found.after == pytest.approx(balancedness(reached, load.mean(axis=0)).mean())
        assert policy == "random" or found.after > found.before


def test_some_plan_of_each_policy_moves_experts():
    placed, load = problem(1)
    for policy in POLICIES:
        assert len(decide(placed, load, changed(policy=policy), **FREE).transfers), policy


def test_the_budget_limits_what_moves():
    placed, load = problem(2)
    slots = {tuple(row) for row in decide(placed, load, changed(max_moves=3), **FREE).transfers[:, [1, 5, 6]]}
    assert 0 < len(slots) <= 3


def test_a_plan_that_does_not_repay_is_made_again_with_fewer_moves():
    """A price between what a quarter of the moves saves for each expert sent and what all of them save."""
    placed, load = problem(3, layers=4, experts=64, ranks=8, redundant=8)
    whole, part = (
        decide(placed, load, changed(max_moves=moves), **FREE | {"seconds_per_byte": 1e-9}) for moves in (80, 20)
    )
    rates = [found.saved_seconds / (found.cost_seconds / 1e-9) for found in (whole, part)]
    assert rates[1] > 1.2 * rates[0]
    found = decide(placed, load, changed(max_moves=80), **FREE | {"seconds_per_byte": sum(rates) / 2})
    assert found.reason == ""
    assert 0 < len(found.transfers) < len(whole.transfers)
    assert found.saved_seconds > found.cost_seconds
    assert decide(
        placed, load, changed(max_moves=80, policy="balanced"), **FREE | {"seconds_per_byte": sum(rates) / 2}
    ).reason


def test_a_plan_is_dropped_unless_it_repays_its_bytes():
    """At the price at which both are equal it is dropped, and carried out a little below."""
    placed, load = problem(3)
    free = decide(placed, load, RULES, **FREE)
    busiest = max(max(np.bincount(free.transfers[:, column])) for column in (3, 5))
    saved = 10 * 1.0 * EXPERT_SHARE * (1 - free.before / free.after)
    price = saved / (100 * busiest)
    cheap = decide(placed, load, RULES, step_seconds=1.0, seconds_per_byte=price * 0.999)
    dear = decide(placed, load, RULES, step_seconds=1.0, seconds_per_byte=price * 1.001)
    assert (cheap.reason, dear.reason) == ("", "does not repay its bytes")
    assert np.array_equal(cheap.transfers, free.transfers)
    assert len(dear.transfers) == 0
    assert (dear.before, dear.after) == (free.before, free.after)
    assert dear.saved_seconds == pytest.approx(saved)


def test_no_load_moves_nothing():
    placed, load = problem(4)
    assert decide(placed, load * 0, RULES, **FREE).reason == "no load"


def test_a_balanced_load_moves_nothing():
    placed, load = problem(5, redundant=0)
    assert decide(placed, np.ones_like(load), RULES, **FREE).reason == "nothing to move"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_window_becomes_one_load(weighting):
    placed, load = problem(6)
    assert 0 < decide(placed, load, changed(weighting=weighting), **FREE).before < 1


def test_a_cycle_longer_than_the_buffers_leaves_a_placement_after_each_batch():
    """Two ranks exchange all their experts, one at a time."""
    placed = spread(num_experts=8, ranks=2)
    exchanged = Placement(placed.physical_to_logical[:, ::-1], 8)
    from vllm_ascend.eplb.decide import _batched

    reached, transfers = _batched(placed, exchanged, np.ones((1, 8)), 1)
    assert np.array_equal(after_batches(placed.physical_to_logical, transfers, 1), reached.physical_to_logical)
    assert np.array_equal(reached.physical_to_logical, exchanged.physical_to_logical)


WRONG = {
    "holds expert 0, not 3": [0, 0, 3, 0, 0, 1, 0],
    "leaves no placement": [0, 0, 0, 0, 0, 1, 0],
    "source_rank is 4, must be below 4": [0, 0, 0, 4, 0, 1, 0],
    "expert is -1": [0, 0, -1, 0, 0, 1, 0],
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_plan_is_refused(said):
    placed = spread(num_experts=8, ranks=4)
    with pytest.raises(ValueError, match=said):
        placement_after(placed, np.array([WRONG[said]], np.int32))


def test_two_transfers_into_one_slot_and_a_batch_of_two_layers_are_refused():
    placed = spread(num_experts=4, ranks=2, redundant=2, layers=2)
    rows = np.array([[0, 0, 0, 0, 0, 1, 2], [0, 0, 1, 0, 1, 1, 2]], np.int32)
    with pytest.raises(ValueError, match="two transfers have one slot as their target"):
        placement_after(placed, rows)
    rows[1, 1] = 1
    with pytest.raises(ValueError, match=r"concerns the layers \[0, 1\]"):
        placement_after(placed, rows)


def test_what_does_not_exist_is_refused():
    placed, load = problem(7)
    with pytest.raises(ValueError, match="policy='flash' must be one of"):
        decide(placed, load, changed(policy="flash"), **FREE)
    with pytest.raises(ValueError, match="weighting='last' must be one of"):
        decide(placed, load, changed(weighting="last"), **FREE)
