# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ascend_eplb as eplb

FEW = settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=2500)
LOADS = ("zero", "one hot", "equal", "integers", "lognormal", "huge skew", "some zero", "zipf")


def make_load(kind, generator, layers, experts):
    shape = (layers, experts)
    if kind == "zero":
        return np.zeros(shape)
    if kind == "one hot":
        load = np.zeros(shape)
        load[:, generator.integers(experts)] = 1000
        return load
    if kind == "equal":
        return np.full(shape, 3.0)
    if kind == "integers":
        return generator.integers(0, 20, shape).astype(float)
    if kind == "lognormal":
        return generator.lognormal(0, 1, shape)
    if kind == "huge skew":
        return generator.lognormal(0, 8, shape)
    if kind == "some zero":
        return generator.lognormal(0, 1, shape) * (generator.random(shape) < 0.4)
    return generator.permuted(np.tile(1.0 / np.arange(1, experts + 1), (layers, 1)), axis=1)


@st.composite
def problems(draw, hierarchical=False):
    """Shapes and loads of all kinds, corners as often as the rest: one slot or two a rank, one rank."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corner = draw(st.sampled_from((0, 0, 1, 2)))
    if corner and not hierarchical:
        ranks = draw(st.integers(1, 24))
        experts = draw(st.integers(corner, corner * ranks))
        load = make_load(draw(st.sampled_from(LOADS)), generator, draw(st.integers(1, 3)), experts)
        return eplb.Problem(load=load, ranks=ranks, slots=corner * ranks), generator
    nodes = draw(st.integers(2, 3)) if hierarchical else 1
    per_node = draw(st.integers(1, 4 if hierarchical else 9))
    groups = nodes * draw(st.integers(1, 3)) if hierarchical else 1
    size = draw(st.integers(1, 5 if hierarchical else 28))
    ranks, experts = nodes * per_node, groups * size
    least, most = -(-experts // ranks), experts // nodes
    if least > most:
        ranks, least = nodes, experts // nodes
    slots = ranks * draw(st.integers(least, min(most, least + 6)))
    load = make_load(draw(st.sampled_from(LOADS)), generator, draw(st.integers(1, 3)), experts)
    problem = eplb.Problem(load=load, ranks=ranks, slots=slots, nodes=nodes, groups=groups)
    return problem, generator


def with_previous(problem, previous, load, **limits):
    return eplb.Problem(
        load=load, ranks=problem.ranks, slots=problem.slots, nodes=problem.nodes, groups=problem.groups,
        previous=previous, **limits,
    )  # fmt: skip


def check_groups(problem, placement):
    if not problem.hierarchical:
        return
    group = placement.physical_to_logical // (problem.num_experts // problem.groups)
    by_node = group.reshape(problem.layers, problem.nodes, -1)
    for layer in by_node:
        homes = [set(node.tolist()) for node in layer]
        assert sum(len(home) for home in homes) == problem.groups


def check_never_below_deepseek(problem):
    mine, theirs = eplb.solve(problem, "balanced"), eplb.solve(problem, "deepseek")
    check_groups(problem, mine.placement)
    check_groups(problem, theirs.placement)
    assert (mine.layer_balancedness >= theirs.layer_balancedness * (1 - 1e-9)).all()
    assert (mine.layer_balancedness <= mine.layer_bound * (1 + 1e-9)).all()
    return mine.placement


@MANY
@given(problems())
def test_balanced_is_valid_and_never_below_deepseek(case):
    check_never_below_deepseek(case[0])


@FEW
@given(problems(hierarchical=True))
def test_balanced_by_node_is_valid_and_never_below_deepseek(case):
    check_never_below_deepseek(case[0])


@FEW
@given(
    problems(hierarchical=True) | problems(), st.sampled_from(["balanced", "incremental", "swift"]), st.integers(0, 3)
)
def test_no_expert_gets_more_replicas_than_the_cap(case, policy, more):
    problem, generator = case
    cap = -(-problem.slots // problem.num_experts) + more
    capped = replace(problem, max_replicas=cap)
    old = eplb.solve(capped).placement
    assert old.replicas.max() <= cap
    check_groups(problem, old)
    load = problem.load * generator.lognormal(0, 1, problem.load.shape)
    found = eplb.solve(replace(capped, load=load, previous=old), policy).placement
    assert found.replicas.max() <= cap


@FEW
@given(
    problems(hierarchical=True) | problems(),
    st.sampled_from(["incremental", "swift"]),
    st.integers(0, 12),
    st.integers(0, 6),
)
def test_limited_policies_keep_limits_and_never_worsen(case, policy, per_call, per_layer):
    problem, generator = case
    old = eplb.solve(problem, "deepseek").placement
    load = problem.load * generator.lognormal(0, 1, problem.load.shape)
    plan = eplb.solve(with_previous(problem, old, load, max_moves=per_call, max_moves_per_layer=per_layer), policy)
    check_groups(problem, plan.placement)
    assert plan.moved <= per_call
    assert plan.layer_moved.max() <= per_layer
    assert (plan.layer_balancedness >= eplb.balancedness(old, load) * (1 - 1e-9)).all()


@FEW
@given(problems(hierarchical=True) | problems(), st.sampled_from(["incremental", "swift"]))
def test_unlimited_policies_never_worsen(case, policy):
    problem, generator = case
    old = eplb.solve(problem, "deepseek").placement
    load = problem.load * generator.lognormal(0, 1, problem.load.shape)
    plan = eplb.solve(with_previous(problem, old, load), policy)
    check_groups(problem, plan.placement)
    assert (plan.layer_balancedness >= eplb.balancedness(old, load) * (1 - 1e-9)).all()


@FEW
@given(
    problems(hierarchical=True) | problems(),
    st.sampled_from(eplb.policy_names()),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_plans_are_executable(case, policy, aligned, send, receive):
    problem, generator = case
    old = eplb.solve(problem, "deepseek").placement
    after = with_previous(problem, old, generator.random(problem.load.shape))
    new = (eplb.solve(after, policy) if aligned or policy == "swift" else
           eplb.solve(replace(after, previous=None), policy)).placement  # fmt: skip
    plan = eplb.transfer_plan(old, new, nodes=problem.nodes)
    eplb.verify_transfers(old, new, plan)
    assert len(plan) == (old.physical_to_logical != new.physical_to_logical).sum()
    batches = eplb.transfer_batches(plan, send=send, receive=receive)
    eplb.verify_transfers(old, new, batches)
    for batch in batches:
        away = ~batch.local
        assert np.bincount(batch.source_rank[away], minlength=1).max() <= send
        assert np.bincount(batch.target_rank[away], minlength=1).max() <= receive


@FEW
@given(problems(), st.sampled_from(eplb.policy_names()), st.sampled_from((np.nan, np.inf, -np.inf, -1e-9, 2e30)))
def test_a_value_that_is_no_load_is_an_error_that_names_its_place(case, policy, value):
    problem, generator = case
    load = problem.load.copy()
    layer, expert = (int(generator.integers(size)) for size in load.shape)
    load[layer, expert] = value
    with pytest.raises(ValueError, match=re.escape(f"load of layer {layer}, expert {expert} is {value};")):
        eplb.rebalance(load, ranks=problem.ranks, slots=problem.slots, policy=policy)


@FEW
@given(problems())
def test_maps_and_placement_agree(case):
    placement = eplb.solve(case[0], "deepseek").placement
    own = eplb.expert_map_all(placement)
    flat = placement.physical_to_logical.reshape(placement.layers, -1)
    targets = eplb.log2phy_all(placement)
    for rank in range(placement.ranks):
        held = own[rank] >= 0
        assert (held.sum(axis=1) == placement.slots_per_rank).all()
        back = np.take_along_axis(flat, targets[rank], axis=1)
        assert np.array_equal(back, np.broadcast_to(np.arange(placement.num_experts), back.shape))
    cluster = eplb.Cluster(ranks=placement.ranks)
    chosen = eplb.log2phy_balanced(placement, case[0].load, cluster)
    mine, theirs = (eplb.received_loads(placement, m, case[0].load).max(axis=1) for m in (chosen, targets))
    assert (mine <= theirs * (1 + 1e-9)).all()
