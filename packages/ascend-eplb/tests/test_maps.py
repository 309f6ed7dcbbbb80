# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest

import ascend_eplb as eplb
from ascend_eplb.maps import replica_table

SEED = np.load(Path(__file__).parent / "data" / "seed_maps.npz")
GOLDEN = eplb.Placement([[[7, 2, 0, 3, 5], [6, 1, 4, 7, 2]]])


@pytest.mark.parametrize("redundant", [0, 16])
@pytest.mark.parametrize(("name", "layout"), [("legacy", eplb.spread), ("head", eplb.checkpoint)])
def test_seed_maps(name, layout, redundant):
    placement = layout(num_experts=256, ranks=16, redundant=redundant)
    assert np.array_equal(placement.physical_to_logical[0], SEED[f"{name}_placement_r{redundant}"])
    for rank in range(16):
        found = eplb.expert_map(placement, rank)
        assert found.dtype == np.int32
        assert found.shape == (1, 256)
        assert np.array_equal(found[0], SEED[f"{name}_expert_map_r{redundant}"][rank])
        assert np.array_equal(eplb.log2phy(placement, rank)[0], SEED[f"{name}_log2phy_r{redundant}"][rank])
    assert np.array_equal(eplb.expert_map_all(placement)[:, 0], SEED[f"{name}_expert_map_r{redundant}"])
    assert np.array_equal(eplb.log2phy_all(placement)[:, 0], SEED[f"{name}_log2phy_r{redundant}"])


def test_golden_example():
    assert GOLDEN.redundant == 2
    assert eplb.expert_map(GOLDEN, 1).tolist() == [[-1, 1, 4, -1, 2, -1, 0, 3]]
    assert eplb.log2phy(GOLDEN, 1).tolist() == [[2, 6, 9, 3, 7, 4, 5, 8]]
    assert eplb.expert_map(GOLDEN, 0).tolist() == [[2, -1, 1, 3, -1, 4, -1, 0]]


def test_rank_15_of_the_mission():
    with_redundancy = eplb.expert_map(eplb.spread(num_experts=256, ranks=16, redundant=16), 15)[0]
    assert with_redundancy[0] == 16
    assert with_redundancy[240:].tolist() == list(range(16))
    assert (with_redundancy[1:240] == -1).all()
    linear = eplb.expert_map(eplb.spread(num_experts=256, ranks=16), 15)[0]
    assert linear.tolist() == [-1] * 240 + list(range(16))


@pytest.mark.parametrize(("experts", "ranks"), [(1, 1), (8, 1), (8, 4), (256, 16), (60, 60), (384, 32)])
@pytest.mark.parametrize("layout", [eplb.spread, eplb.checkpoint])
def test_without_redundancy_the_map_is_vllms_linear_one(experts, ranks, layout):
    placement, size = layout(num_experts=experts, ranks=ranks), experts // ranks
    for rank in range(ranks):
        linear = np.full(experts, -1)
        linear[rank * size : (rank + 1) * size] = np.arange(size)
        assert np.array_equal(eplb.expert_map(placement, rank)[0], linear)
        assert np.array_equal(eplb.log2phy(placement, rank)[0], np.arange(experts))


def random_placement(seed):
    generator = np.random.default_rng(seed)
    ranks = int(generator.integers(1, 9))
    experts = int(generator.integers(ranks, 30))
    slots = int(generator.integers(-(-experts // ranks), experts + 1))
    load = generator.lognormal(0, 1.5, (int(generator.integers(1, 4)), experts))
    return eplb.rebalance(load, ranks=ranks, slots=ranks * slots).placement, load


def slow_candidates(placement, layer, expert):
    found = []
    for rank in range(placement.ranks):
        for slot in range(placement.slots_per_rank):
            if placement.physical_to_logical[layer, rank, slot] == expert:
                found.append(rank * placement.slots_per_rank + slot)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_maps_against_loops(seed):
    placement, _ = random_placement(seed)
    for tp in {1, placement.ranks}:
        everyone = eplb.log2phy_all(placement, tp)
        for layer in range(placement.layers):
            for expert in range(placement.num_experts):
                candidates = slow_candidates(placement, layer, expert)
                for rank in range(placement.ranks):
                    turn = rank if tp == 1 else rank % tp + rank // tp + expert
                    expected = candidates[turn % len(candidates)]
                    assert everyone[rank, layer, expert] == expected
                    assert eplb.log2phy(placement, rank, tp)[layer, expert] == expected
                    slot = next((c % placement.slots_per_rank for c in candidates
                                 if c // placement.slots_per_rank == rank), -1)  # fmt: skip
                    assert eplb.expert_map(placement, rank)[layer, expert] == slot
                    assert eplb.expert_map_all(placement)[rank, layer, expert] == slot


@pytest.mark.parametrize("seed", range(10))
def test_routing_table_spreads_over_all_replicas(seed):
    placement, _ = random_placement(seed)
    rows = int(np.lcm.reduce(placement.replicas.ravel()))
    table = eplb.routing_table(placement, rows)
    assert table.shape == (placement.layers, rows, placement.num_experts)
    assert table.dtype == np.int32
    for layer in range(placement.layers):
        for expert in range(placement.num_experts):
            candidates = slow_candidates(placement, layer, expert)
            expected = [candidates[(row + expert) % len(candidates)] for row in range(rows)]
            assert table[layer, :, expert].tolist() == expected
            assert set(np.bincount(expected)[candidates]) == {rows // len(candidates)}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_balanced_map_is_never_worse(seed, nodes, tensor_parallel):
    placement, load = random_placement(seed)
    nodes = nodes if placement.ranks % nodes == 0 else 1
    tp = placement.ranks if tensor_parallel else 1
    cluster = eplb.Cluster(ranks=placement.ranks, nodes=nodes, tp_size=tp)
    found = eplb.log2phy_balanced(placement, load, cluster)
    assert found.dtype == np.int32
    classic = eplb.log2phy_all(placement, tp)
    mine, theirs = (eplb.received_loads(placement, table, load).max(axis=1) for table in (found, classic))
    assert (mine <= theirs * (1 + 1e-9)).all()
    flat = placement.physical_to_logical.reshape(placement.layers, -1)
    for rank in range(placement.ranks):
        assert np.array_equal(
            np.take_along_axis(flat, found[rank], axis=1), np.tile(np.arange(load.shape[1]), (len(load), 1))
        )


def test_received_loads_against_loops():
    placement, load = random_placement(3)
    table = eplb.log2phy_all(placement)
    expected = np.zeros((placement.layers, placement.ranks))
    for rank in range(placement.ranks):
        for layer in range(placement.layers):
            for expert in range(placement.num_experts):
                target = table[rank, layer, expert] // placement.slots_per_rank
                expected[layer, target] += load[layer, expert] / placement.ranks
    assert np.allclose(eplb.received_loads(placement, table, load), expected)


def test_balanced_map_prefers_the_own_rank_then_the_node():
    placement = eplb.spread(num_experts=8, ranks=8, redundant=24)
    load = np.ones((1, 8))
    found = eplb.log2phy_balanced(placement, load, eplb.Cluster(ranks=8, nodes=2))
    own = eplb.expert_map_all(placement)
    for rank in range(8):
        for expert in np.flatnonzero(own[rank, 0] >= 0):
            assert found[rank, 0, expert] == rank * placement.slots_per_rank + own[rank, 0, expert]
    target = found[:, 0] // placement.slots_per_rank
    classic = eplb.log2phy_all(placement)[:, 0] // placement.slots_per_rank
    near, classic_near = ((t // 4 == np.arange(8)[:, None] // 4).mean() for t in (target, classic))
    assert near > classic_near + 0.1


def test_balanced_map_evens_out_the_known_bad_case():
    """16 ranks with tp 4 and 12 replicas: the classic rule leaves five replicas idle."""
    slots = np.zeros((1, 16, 2), dtype=int)
    slots[0, :, 1] = np.arange(1, 17)
    slots[0, 12:, 0] = [17, 18, 19, 20]
    placement = eplb.Placement(slots)
    load = np.full((1, 21), 1e-6)
    load[0, 0] = 12.0
    used = np.unique(eplb.log2phy_all(placement, 4)[:, 0, 0])
    assert len(used) == 7
    found = eplb.log2phy_balanced(placement, load, eplb.Cluster(ranks=16, tp_size=4))
    assert len(np.unique(found[:, 0, 0])) == 12


def test_errors():
    with pytest.raises(ValueError, match=r"rank=2 is not in 0\.\.1"):
        eplb.expert_map(GOLDEN, 2)
    with pytest.raises(ValueError, match=r"rank=-1 is not in 0\.\.1"):
        eplb.log2phy(GOLDEN, -1)
    for wrong in (1.0, "1", True):
        with pytest.raises(TypeError, match="rank must be an integer"):
            eplb.expert_map(GOLDEN, wrong)
    with pytest.raises(TypeError, match="nodes must be an integer"):
        eplb.Cluster(ranks=4, nodes=2.0)
    with pytest.raises(ValueError, match="tp_size=3 must divide the 2 ranks"):
        eplb.log2phy_all(GOLDEN, 3)
    with pytest.raises(ValueError, match="rows=0"):
        eplb.routing_table(GOLDEN, 0)
    with pytest.raises(ValueError, match=r"cluster.ranks=4, but the placement has 2"):
        eplb.log2phy_balanced(GOLDEN, np.ones((1, 8)), eplb.Cluster(ranks=4))
    with pytest.raises(ValueError, match="nodes=3 must divide ranks=4"):
        eplb.Cluster(ranks=4, nodes=3)
    order, start, count = replica_table(GOLDEN)
    assert order[0, start[0, 2] : start[0, 2] + count[0, 2]].tolist() == [1, 9]
