# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest

import ascend_eplb as eplb


def two_placements(seed, ranks=4, experts=12, slots=20, layers=3):
    generator = np.random.default_rng(seed)
    return tuple(
        eplb.rebalance(generator.lognormal(0, 1, (layers, experts)), ranks=ranks, slots=slots).placement
        for _ in range(2)
    )


@pytest.mark.parametrize("seed", range(20))
def test_alignment_keeps_what_stays_in_its_slot(seed):
    old, new = two_placements(seed)
    aligned = eplb.align_slots(old, new)
    for layer, rank in itertools.product(range(old.layers), range(old.ranks)):
        before, wanted, found = (p.physical_to_logical[layer, rank].tolist() for p in (old, new, aligned))
        assert sorted(found) == sorted(wanted)
        for slot, expert in enumerate(before):
            if expert in wanted:
                assert found[slot] == expert
        newcomers = [expert for expert in wanted if expert not in before]
        assert [expert for expert in found if expert not in before] == newcomers


def shared(old, new, layer, order):
    rows = zip(old.physical_to_logical[layer], new.physical_to_logical[layer][list(order)], strict=True)
    return sum(len(set(a.tolist()) & set(b.tolist())) for a, b in rows)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("nodes", [1, 2])
def test_relabelling_is_close_to_the_best_order(seed, nodes):
    old, new = two_placements(seed)
    found = eplb.relabel_ranks(old, new, nodes=nodes)
    orders = [o for o in itertools.permutations(range(4)) if all(o[r] * nodes // 4 == r * nodes // 4 for r in range(4))]
    for layer in range(old.layers):
        best = max(shared(old, new, layer, order) for order in orders)
        mine = shared(old, found, layer, range(4))
        assert shared(old, new, layer, range(4)) <= mine <= best
        assert mine >= best - 1
        for node in range(nodes):
            part = slice(node * 4 // nodes, (node + 1) * 4 // nodes)
            assert sorted(map(tuple, found.physical_to_logical[layer, part].tolist())) == sorted(
                map(tuple, new.physical_to_logical[layer, part].tolist())
            )


def test_relabelling_finds_a_mere_renaming():
    old, _ = two_placements(0)
    order = np.array([2, 0, 3, 1])
    renamed = eplb.Placement(old.physical_to_logical[:, order], old.num_experts)
    assert eplb.moved_slots(old, eplb.relabel_ranks(old, renamed)).sum() == 0


def test_relabelling_leaves_alone_what_it_cannot_improve():
    whole = eplb.spread(num_experts=6, ranks=6, redundant=30)  # every rank holds every expert
    assert eplb.relabel_ranks(whole, whole) == whole
    shuffled = eplb.Placement(whole.physical_to_logical[:, ::-1])
    assert eplb.relabel_ranks(whole, shuffled) == shuffled


def test_relabelling_without_anything_in_common():
    old = eplb.Placement([[[0, 1], [0, 1], [2, 3], [2, 3]]])
    new = eplb.Placement([[[2, 3], [2, 3], [0, 1], [0, 1]]])
    assert eplb.moved_slots(old, eplb.relabel_ranks(old, new)).sum() == 0
    assert eplb.relabel_ranks(old, new, nodes=2) == new


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_senders_are_near_and_balanced(seed, nodes):
    old, new = two_placements(seed, ranks=8, experts=16, slots=40)
    plan = eplb.transfer_plan(old, new, nodes=nodes)
    eplb.verify_transfers(old, new, plan)
    per_node = 8 // nodes
    for index in range(len(plan)):
        layer, expert, target = plan.layer[index], plan.expert[index], plan.target_rank[index]
        holders = np.flatnonzero((old.physical_to_logical[layer] == expert).any(axis=1))
        source = plan.source_rank[index]
        near = holders[holders // per_node == target // per_node]
        if target in holders:
            assert source == target
        elif len(near):
            assert source in near
        else:
            assert source in holders
    assert plan.bytes_moved(10) == 10 * int((plan.source_rank != plan.target_rank).sum())
    assert plan.bytes_between_nodes(1) == int((plan.source_rank // per_node != plan.target_rank // per_node).sum())


def test_many_holders_share_the_sending():
    old = eplb.Placement([[[0, 1], [0, 2], [0, 3], [4, 5], [6, 7], [8, 9]]])
    new = eplb.Placement([[[1, 2], [3, 4], [5, 6], [0, 7], [0, 8], [0, 9]]])
    plan = eplb.transfer_plan(old, new)
    senders = plan.source_rank[plan.expert == 0]
    assert sorted(senders.tolist()) == [0, 1, 2]


def test_unchanged_placement_needs_nothing():
    old, _ = two_placements(0)
    plan = eplb.transfer_plan(old, old)
    assert len(plan) == 0
    assert plan.bytes_moved(1) == 0
    assert eplb.transfer_batches(plan, send=1, receive=1) == []
    eplb.verify_transfers(old, old, plan)


def test_a_long_cycle_in_small_buffers():
    ids = np.arange(8).reshape(1, 2, 4)
    rolled = np.roll(ids.transpose(0, 2, 1).reshape(1, -1), 1).reshape(1, 4, 2).transpose(0, 2, 1)
    old, new = eplb.Placement(ids), eplb.Placement(rolled)
    plan = eplb.transfer_plan(old, new)
    for size in (1, 2, 3, 4):
        batches = eplb.transfer_batches(plan, send=size, receive=size)
        eplb.verify_transfers(old, new, batches)
        assert all(np.bincount(b.source_rank[~b.local], minlength=2).max() <= size for b in batches)
    assert len(eplb.transfer_batches(plan, send=4, receive=4)) == 1
    with pytest.raises(ValueError, match="send=0"):
        eplb.transfer_batches(plan, send=0, receive=1)


def test_the_verifier_bites():
    old, new = two_placements(1)
    plan = eplb.transfer_plan(old, new)
    with pytest.raises(ValueError, match=r"layer \d, rank \d, slot \d ends with expert"):
        eplb.verify_transfers(old, new, plan.select(np.arange(len(plan) - 1)))
    with pytest.raises(ValueError, match=r"batch 0: layer \d, rank \d, slot \d holds expert \d+, not"):
        eplb.verify_transfers(new, old, plan)
    with pytest.raises(ValueError, match="two transfers write the same slot"):
        eplb.verify_transfers(old, new, plan.select(np.r_[0, 0 : len(plan)]))
    hasty = [plan.select(np.array([index])) for index in range(len(plan))]
    with pytest.raises(ValueError, match=r"batch \d+: layer"):
        eplb.verify_transfers(old, new, hasty)


def test_placements_of_other_shapes_are_refused():
    old, new = two_placements(0)[0], two_placements(0, slots=24)[0]
    for call in (eplb.align_slots, eplb.relabel_ranks, eplb.transfer_plan):
        with pytest.raises(ValueError, match="differ in slots per rank: 5 and 6"):
            call(old, new)
    with pytest.raises(ValueError, match="differ in layers: 3 and 2"):
        eplb.transfer_plan(old, two_placements(0, layers=2)[0])
    with pytest.raises(ValueError, match="nodes=3 must divide ranks=4"):
        eplb.transfer_plan(old, old, nodes=3)


def test_simulation_scores_on_the_next_window():
    generator = np.random.default_rng(0)
    history = generator.lognormal(0, 1, (7, 2, 16))
    problem = eplb.Problem(load=history[0], ranks=4, slots=20)
    scores = eplb.simulate(history, problem, window=2)
    assert [score.window for score in scores] == [1, 2]
    start = eplb.spread(num_experts=16, ranks=4, redundant=4, layers=2)
    first = eplb.rebalance(history[:2].mean(0), ranks=4, slots=20, previous=start)
    seen = history[2:4].mean(0)
    assert scores[0].reached == pytest.approx(eplb.balancedness(first.placement, seen).mean())
    assert scores[0].kept == pytest.approx(eplb.balancedness(start, seen).mean())
    assert scores[0].planned == pytest.approx(first.balancedness)
    assert scores[0].moved == first.moved
    with pytest.raises(ValueError, match="window=4 needs a history of at least 8 steps, not 7"):
        eplb.simulate(history, problem, window=4)


def test_simulation_plans_on_the_weighted_window_and_scores_on_the_mean():
    history = np.random.default_rng(1).lognormal(0, 1, (4, 2, 16))
    problem = eplb.Problem(load=history[0], ranks=4, slots=20)

    def last(steps):
        return steps[-1]

    (score,) = eplb.simulate(history, problem, window=2, weigh=last)
    start = eplb.spread(num_experts=16, ranks=4, redundant=4, layers=2)
    plan = eplb.rebalance(history[1], ranks=4, slots=20, previous=start)
    assert score.planned == pytest.approx(plan.balancedness)
    assert score.reached == pytest.approx(eplb.balancedness(plan.placement, history[2:].mean(0)).mean())


def test_a_slot_is_not_overwritten_before_its_last_reader():
    """Expert 0 leaves rank 0 for two ranks, one at a time; only then may rank 0's slot take another."""
    old = eplb.Placement([[[0, 1], [5, 2], [5, 3], [4, 5]]])
    new = eplb.Placement([[[4, 1], [0, 2], [0, 3], [4, 5]]])
    plan = eplb.transfer_plan(old, new)
    batches = eplb.transfer_batches(plan, send=1, receive=1)
    eplb.verify_transfers(old, new, batches)
    last_read = max(number for number, b in enumerate(batches) if (b.expert[b.source_rank == 0] == 0).any())
    written = [number for number, b in enumerate(batches) if ((b.target_rank == 0) & (b.target_slot == 0)).any()]
    assert last_read == 1
    assert min(written) >= last_read
