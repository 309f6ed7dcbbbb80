# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest

import ascend_eplb as eplb
from ascend_eplb.policies.deepseek import repaired_assignment
from ascend_eplb.policies.packing import balanced_packing_vectorised

README = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
README_HIERARCHICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
FEW_LARGE = [[600, 560, 120, 120, 20, 10, 10, 10]]


def peaks(plan, load):
    return eplb.rank_loads(plan.placement, load).max(axis=1)


def test_deepseek_readme_example():
    found = eplb.deepseek_assignment(README, slots=16, ranks=8, nodes=2, groups=4)
    assert found.tolist() == README_HIERARCHICAL


def slow_pack(weights, packs):
    """Items of each pack: heaviest first to the lightest pack with room."""
    if len(weights) == packs:
        return [[item] for item in range(packs)]
    held, total = [[] for _ in range(packs)], [np.float32(0)] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        pack = min((p for p in range(packs) if len(held[p]) < len(weights) // packs), key=lambda p: total[p])
        held[pack].append(item)
        total[pack] += weights[item]
    return held


def slow_published(load, slots, ranks, nodes, groups):
    """One layer by the published three steps, on plain lists."""
    size = len(load) // groups
    group_loads = [load[group * size : (group + 1) * size].sum() for group in range(groups)]
    found = []
    for mates in slow_pack(group_loads, nodes):
        experts = [group * size + index for group in mates for index in range(size)]
        copies, count = list(experts), dict.fromkeys(experts, 1)
        while len(copies) < slots // nodes:
            hottest = max(experts, key=lambda expert: load[expert] / np.float32(count[expert]))
            copies.append(hottest)
            count[hottest] += 1
        shares = [load[expert] / np.float32(count[expert]) for expert in copies]
        found += [copies[item] for rank in slow_pack(shares, ranks // nodes) for item in rank]
    return found


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("hierarchical", [False, True])
def test_deepseek_is_the_published_algorithm_step_by_step(seed, hierarchical):
    generator = np.random.default_rng(seed)
    nodes = int(generator.integers(1, 4)) if hierarchical else 1
    groups = nodes * int(generator.integers(1, 4)) if hierarchical else 1
    ranks, experts = nodes * int(generator.integers(1, 6)), groups * int(generator.integers(1, 9))
    slots = ranks * int(generator.integers(-(-experts // ranks), 2 + -(-experts // ranks) * 2))
    if slots % nodes or experts > slots:
        slots = ranks * experts
    load = generator.permutation(60_000)[: 2 * experts].reshape(2, experts).astype(np.float32)  # exact sums
    found = eplb.deepseek_assignment(load, slots=slots, ranks=ranks, nodes=nodes, groups=groups)
    assert found.tolist() == [slow_published(layer, slots, ranks, nodes, groups) for layer in load]


@pytest.mark.parametrize(
    "sizes", [(13, 4, 1, 1), (4, 2, 1, 1), (16, 8, 3, 3), (16, 8, 2, 5), (16, 8, 0, 1), (0, 0, 1, 1)]
)
def test_deepseek_assignment_refuses_sizes_that_do_not_divide(sizes):
    slots, ranks, nodes, groups = sizes
    with pytest.raises(ValueError, match=f"slots={slots}, ranks={ranks}, nodes={nodes}"):
        eplb.deepseek_assignment(np.ones((1, 8)), slots=slots, ranks=ranks, nodes=nodes, groups=groups)


def test_deepseek_readme_example_without_groups():
    found = eplb.deepseek_assignment(README, slots=16, ranks=8)
    share = README / np.array([np.bincount(row, minlength=12) for row in found])
    sums = np.take_along_axis(share, found, axis=1).reshape(2, 8, 2).sum(axis=2)
    assert sums.max(axis=1).tolist() == [138.5, 172.0]


def test_balanced_readme_example_reaches_its_optimum():
    plan = eplb.rebalance(README, ranks=8, slots=16)
    assert peaks(plan, README).tolist() == [136.0, 172.0]


def test_balanced_hierarchical_readme_example_reaches_its_optimum():
    plan = eplb.rebalance(README, ranks=8, slots=16, nodes=2, groups=4)
    assert peaks(plan, README).tolist() == [151.0, 179.5]
    assert groups_per_node(plan.placement, 2, 4).max() == 1


def test_balanced_few_large_experts_reaches_its_optimum():
    plan = eplb.rebalance(FEW_LARGE, ranks=8, slots=16)
    assert peaks(plan, FEW_LARGE) == pytest.approx(196.6667, abs=1e-3)


def groups_per_node(placement, nodes, groups):
    """Nodes that hold each group, [L, G]."""
    group_of = np.arange(placement.num_experts) * groups // placement.num_experts
    found = np.zeros((placement.layers, groups), dtype=int)
    for layer in range(placement.layers):
        by_node = placement.physical_to_logical[layer].reshape(nodes, -1)
        for group in range(groups):
            found[layer, group] = sum(group in group_of[ids] for ids in by_node)
    return found


def test_deepseek_falls_back_to_global_where_nodes_do_not_divide_groups():
    plain = eplb.deepseek_assignment(README, slots=16, ranks=8)
    assert np.array_equal(eplb.deepseek_assignment(README, slots=16, ranks=8, nodes=2, groups=3), plain)


def test_deepseek_policy_is_the_repaired_one():
    plan = eplb.rebalance(README, ranks=8, slots=16, policy="deepseek", nodes=2, groups=4)
    assert plan.placement.physical_to_logical.reshape(2, 16).tolist() == README_HIERARCHICAL
    problem = eplb.Problem(load=README, ranks=8, slots=16, nodes=2, groups=4)
    assert repaired_assignment(problem, balanced_packing_vectorised).reshape(2, 16).tolist() == README_HIERARCHICAL


@pytest.mark.parametrize("policy", ["balanced", "incremental", "swift"])
@pytest.mark.parametrize(("nodes", "groups"), [(1, 1), (2, 4)])
def test_policies_from_a_placement_in_force(policy, nodes, groups):
    generator = np.random.default_rng(0)
    load = generator.lognormal(0, 1, (6, 32))
    old = eplb.rebalance(load, ranks=8, slots=48, nodes=nodes, groups=groups).placement
    drift = load * generator.lognormal(0, 0.4, load.shape)
    plan = eplb.rebalance(drift, ranks=8, slots=48, policy=policy, nodes=nodes, groups=groups, previous=old)
    assert plan.balancedness > eplb.balancedness(old, drift).mean()
    assert plan.moved == eplb.moved_slots(old, plan.placement).sum() > 0
    assert np.allclose(plan.layer_balancedness, eplb.balancedness(plan.placement, drift))
    assert (plan.layer_balancedness <= plan.layer_bound * (1 + 1e-9)).all()
    if nodes > 1:
        assert groups_per_node(plan.placement, nodes, groups).max() == 1
    if policy == "swift":
        base = [
            [int(np.flatnonzero(layer == e)[0]) for e in range(32)] for layer in old.physical_to_logical.reshape(6, -1)
        ]
        kept = np.take_along_axis(plan.placement.physical_to_logical.reshape(6, -1), np.array(base), axis=1)
        assert np.array_equal(kept, np.tile(np.arange(32), (6, 1)))


@pytest.mark.parametrize("policy", ["incremental", "swift"])
@pytest.mark.parametrize(("nodes", "groups"), [(1, 1), (2, 4)])
@pytest.mark.parametrize(("per_call", "per_layer"), [(0, None), (5, None), (20, 2), (None, 1), (None, 3), (40, 10)])
def test_move_limits(policy, nodes, groups, per_call, per_layer):
    generator = np.random.default_rng(1)
    load = generator.lognormal(0, 1, (5, 32))
    old = eplb.rebalance(load, ranks=8, slots=48, nodes=nodes, groups=groups).placement
    problem = eplb.Problem(
        load=generator.lognormal(0, 1, load.shape), ranks=8, slots=48, nodes=nodes, groups=groups, previous=old,
        max_moves=per_call, max_moves_per_layer=per_layer,
    )  # fmt: skip
    plan = eplb.solve(problem, policy)
    before = eplb.balancedness(old, problem.load)
    assert plan.moved <= (per_call if per_call is not None else 10**9)
    assert plan.layer_moved.max() <= (per_layer if per_layer is not None else 10**9)
    if per_call == 0:
        assert plan.placement == old
    else:
        assert plan.balancedness > before.mean()
    assert (plan.layer_balancedness >= before - 1e-12).all()


def test_more_moves_give_more_balance():
    generator = np.random.default_rng(2)
    load = generator.lognormal(0, 1, (6, 64))
    old = eplb.rebalance(load, ranks=8, slots=80).placement
    drift = load * generator.lognormal(0, 0.4, load.shape)
    found = [
        eplb.rebalance(drift, ranks=8, slots=80, policy="incremental", previous=old, max_moves=limit).balancedness
        for limit in (0, 6, 20, 60, 200)
    ]
    assert found == sorted(found)
    assert found[0] < found[1] < found[2] < found[3]


def test_incremental_after_a_large_drift_places_anew():
    generator = np.random.default_rng(3)
    old = eplb.spread(num_experts=64, ranks=16, redundant=16, layers=4)
    load = generator.permutation(1.0 / np.arange(1, 257)).reshape(4, 64)
    plan = eplb.rebalance(load, ranks=16, slots=80, policy="incremental", previous=old)
    assert (plan.layer_balancedness >= 0.95 * plan.layer_bound).all()


def test_replica_cap_and_survivors():
    load = np.full((1, 16), 1.0)
    load[0, 0] = 40.0
    problem = eplb.Problem(load=load, ranks=8, slots=24, max_replicas=3)
    assert eplb.solve(problem).placement.replicas.max() == 3
    assert eplb.rebalance(load, ranks=8, slots=24).placement.replicas.max() > 3
    previous = eplb.solve(problem).placement
    left = eplb.reduce_to_survivors(eplb.Problem(load=load, ranks=8, slots=24, previous=previous), (2, 5))
    assert (left.ranks, left.slots) == (6, 18)
    for policy in ("balanced", "incremental", "swift"):
        placement = eplb.solve(left, policy).placement
        assert (placement.ranks, placement.slots_per_rank) == (6, 3)
    with pytest.raises(ValueError, match="names rank 8"):
        eplb.reduce_to_survivors(problem, (8,))
    with pytest.raises(ValueError, match=r"leaves 15 slots for 16 experts"):
        eplb.reduce_to_survivors(problem, (0, 1, 2))


@pytest.mark.parametrize("slots", [16, 24, 32])
@pytest.mark.parametrize("cap", [2, 3])
def test_replica_cap_whatever_the_slots_a_rank(slots, cap):
    load = np.ones((2, 12))
    load[:, 0] = 50.0
    placement = eplb.solve(eplb.Problem(load=load, ranks=8, slots=slots, max_replicas=cap + slots // 16)).placement
    assert placement.replicas.max() == cap + slots // 16


@pytest.mark.parametrize(("ranks", "experts"), [(27, 9), (28, 14), (29, 29), (4, 5)])
def test_two_slots_a_rank_are_never_below_deepseek_where_pairs_need_repair(ranks, experts):
    """With few experts, replicas of one meet in pairs, and taking them apart may cost more than the search gained."""
    generator = np.random.default_rng(0)
    load = generator.choice([1.0, 3.0], (60, experts)) / np.arange(1, experts + 1)
    load[:30] = generator.lognormal(0, 1, (30, experts))
    mine, theirs = (
        eplb.rebalance(load, ranks=ranks, slots=2 * ranks, policy=name) for name in ("balanced", "deepseek")
    )
    assert (mine.layer_balancedness >= theirs.layer_balancedness * (1 - 1e-9)).all()


def test_without_redundancy_the_bound_knows_the_company_of_the_heaviest():
    load = np.array([[9.0, 1, 2, 3, 4, 5]])
    problem = eplb.Problem(load=load, ranks=2, slots=6)
    assert eplb.peak_bound(problem).tolist() == [12.0]  # 9 + 1 + 2; the mean is 12
    problem = eplb.Problem(load=load, ranks=3, slots=6)
    assert eplb.peak_bound(problem).tolist() == [10.0]  # 9 + 1; the mean is 8
    assert eplb.solve(problem).layer_balancedness.tolist() == [0.8]
    assert eplb.solve(problem).bound == 0.8


def test_a_function_can_be_a_policy():
    def default(problem):
        return eplb.spread(num_experts=problem.num_experts, ranks=problem.ranks, layers=problem.layers)

    plan = eplb.rebalance(np.ones((2, 8)), ranks=4, slots=8, policy=default)
    assert plan.placement == eplb.spread(num_experts=8, ranks=4, layers=2)
    assert plan.balancedness == plan.bound == 1.0


SANE = {"load": np.ones((1, 8)), "ranks": 4, "slots": 12}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "best"}, "policy='best' is not one of balanced, incremental, swift, deepseek"),
        ({"slots": 13}, "slots=13 must be a multiple of ranks=4"),
        ({"slots": 4}, "slots=4 cannot hold 8 experts"),
        ({"slots": 36}, "at most slots=32"),
        ({"nodes": 3}, "nodes=3 must divide ranks=4"),
        ({"groups": 3}, "groups=3 must divide the 8 experts"),
        ({"ranks": 0}, "ranks=0 must be at least 1"),
        ({"max_moves": 3}, "max_moves=3 needs the previous placement"),
        ({"nodes": 2, "groups": 2, "slots": 20}, "a node holds only 4 different experts"),
        ({"policy": "swift"}, "give previous"),
        ({"previous": eplb.spread(num_experts=8, ranks=4)}, "previous has .* = \\(1, 8, 4, 8\\), the problem"),
        ({"load": [[1, np.nan, 1, 1, 1, 1, 1, 1]]}, "load of layer 0, expert 1 is nan"),
        ({"load": [[1, 1, -1, 1, 1, 1, 1, 1]]}, "load of layer 0, expert 2 is -1"),
        ({"load": np.zeros((1, 2, 3))}, "axes"),
    ],
)
def test_errors_name_the_argument(change, words):
    with pytest.raises(ValueError, match=words):
        eplb.rebalance(**{**SANE, **change})


@pytest.mark.parametrize("policy", ["balanced", "deepseek"])
def test_policies_that_place_anew_refuse_move_limits(policy):
    previous = eplb.spread(num_experts=8, ranks=4, redundant=4)
    with pytest.raises(ValueError, match="incremental"):
        eplb.rebalance(**SANE, policy=policy, previous=previous, max_moves=1)


def test_registry():
    assert eplb.policy_names() == ("balanced", "incremental", "swift", "deepseek")
    for name, value in (("ranks", 4.0), ("slots", True), ("max_moves", 1.5), ("nodes", None), ("previous", [[0]])):
        with pytest.raises(TypeError, match=f"{name} must be"):
            eplb.rebalance(np.ones((1, 8)), **{"ranks": 4, "slots": 8, name: value})
    assert eplb.rebalance(np.ones((1, 8)), ranks=np.int64(4), slots=np.int32(8)).balancedness == 1.0
