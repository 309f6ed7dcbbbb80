# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest

from ascend_eplb.policies.deepseek import balanced_packing, replicate_experts
from ascend_eplb.policies.packing import (
    balanced_packing_vectorised,
    capped_replica_counts,
    descending_order,
    difference,
    difference_peaks,
    sorted_items,
)
from ascend_eplb.policies.repair import duplicate_slots, repair_duplicates
from ascend_eplb.policies.search import pair_peaks, search_pair_counts


@pytest.mark.parametrize("seed", range(30))
def test_longest_first_is_the_plain_one(seed):
    generator = np.random.default_rng(seed)
    packs, capacity = generator.integers(1, 9, 2)
    weight = generator.lognormal(0, 1, (3, packs * capacity)).astype(np.float32)
    if seed % 3 == 0:
        weight[weight < np.median(weight)] = 0
    for mine, theirs in zip(balanced_packing_vectorised(weight, packs), balanced_packing(weight, packs), strict=True):
        assert np.array_equal(mine, theirs)


def brute_least_share(load, slots, cap):
    best = np.inf
    for counts in itertools.product(range(1, cap + 1), repeat=len(load)):
        if sum(counts) == slots:
            best = min(best, (load / np.array(counts)).max())
    return best


@pytest.mark.parametrize("seed", range(15))
def test_capped_counts_minimise_the_greatest_share(seed):
    generator = np.random.default_rng(seed)
    load = generator.lognormal(0, 2, (2, 4))
    for cap in (2, 3, 5):
        slots = int(generator.integers(4, 4 * cap + 1))
        counts = capped_replica_counts(load, slots, cap)
        assert (counts.sum(axis=1) == slots).all()
        assert counts.min() >= 1
        assert counts.max() <= cap
        for layer in range(2):
            assert (load / counts)[layer].max() == pytest.approx(brute_least_share(load[layer], slots, cap))


def slow_counts(load, slots, cap):
    counts = [1] * len(load)
    while sum(counts) < slots:
        open_ones = [e for e in range(len(load)) if counts[e] < cap]
        counts[max(open_ones, key=lambda e: load[e] / type(load[e])(counts[e]))] += 1
    return counts


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize("seed", range(12))
def test_counts_given_at_once_are_those_given_one_by_one(seed, kind):
    generator = np.random.default_rng(seed)
    experts, spare = int(generator.integers(5, 60)), int(generator.integers(49, 300))
    cap = int(generator.integers(2 + spare // experts, 3 + spare))
    load = generator.lognormal(0, generator.choice([0.3, 1, 4]), (3, experts)).astype(kind)
    load[0, : experts // 2] = 0
    if seed % 4 == 0:
        load[2] = 0
    counts = capped_replica_counts(load, experts + spare, cap)
    assert counts.tolist() == [slow_counts(layer, experts + spare, cap) for layer in load]


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_descending_order_is_stable(kind):
    generator = np.random.default_rng(0)
    values = generator.integers(0, 20, (5, 300)).astype(kind) / kind(7)
    values[1], values[2, ::2] = 0, -0.0
    assert np.array_equal(descending_order(values), np.argsort(-values, axis=1, kind="stable"))


def slow_difference(share, ranks):
    """Rank sums after merging the two widest tuples, heaviest sum with lightest, until one is left."""
    tuples = [share[start : start + ranks] for start in range(0, len(share), ranks)]
    while len(tuples) > 1:
        tuples.sort(key=lambda sums: max(sums) - min(sums), reverse=True)
        first, second, *rest = tuples
        tuples = [[a + b for a, b in zip(sorted(first), sorted(second)[::-1], strict=True)], *rest]
    return sorted(tuples[0])


@pytest.mark.parametrize("seed", range(12))
def test_differencing_against_plain_lists(seed):
    generator = np.random.default_rng(seed)
    ranks, blocks = int(generator.integers(1, 9)), int(generator.integers(1, 9))
    load = generator.lognormal(0, 1, (3, ranks * blocks))
    experts, share = sorted_items(load, np.ones(load.shape, dtype=np.int64))
    packed = difference(experts, share, ranks)
    assert np.array_equal(np.sort(packed.reshape(3, -1), axis=1), np.tile(np.arange(ranks * blocks), (3, 1)))
    sums = np.sort(np.take_along_axis(load, packed.reshape(3, -1), axis=1).reshape(packed.shape).sum(axis=2), axis=1)
    assert np.allclose(sums, [slow_difference(row, ranks) for row in share.tolist()])
    assert np.allclose(difference_peaks(share, ranks), sums[:, -1])


def brute_least_pair_peak(items):
    """The least possible greatest pair sum, over all ways to form pairs."""
    if not items:
        return 0.0
    first, *rest = items
    return min(
        max(first + rest[index], brute_least_pair_peak(rest[:index] + rest[index + 1 :])) for index in range(len(rest))
    )


@pytest.mark.parametrize("seed", range(8))
def test_pair_peaks_are_the_best_pairing(seed):
    generator = np.random.default_rng(seed)
    load, counts = generator.lognormal(0, 1, (2, 4)), np.array([[3, 1, 2, 2], [1, 1, 1, 5]])
    expected = [brute_least_pair_peak(np.repeat(load[b] / counts[b], counts[b]).tolist()) for b in range(2)]
    assert np.allclose(pair_peaks(load, counts), expected)
    assert np.allclose(pair_peaks(load.astype(np.float32), counts), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_ladder_counts_are_valid_and_never_worse(seed):
    generator = np.random.default_rng(seed)
    ranks = int(generator.integers(2, 60))
    load = generator.lognormal(
        0, generator.choice([0.5, 1, 3]), (4, int(generator.integers(ranks // 2 + 2, 2 * ranks)))
    )
    load[0] = 0
    cap = int(generator.integers(-(-2 * ranks // load.shape[1]), ranks + 1))
    start = capped_replica_counts(load, 2 * ranks, cap)
    found = search_pair_counts(load, start, ranks=ranks, cap=cap)
    assert (found.sum(axis=1) == 2 * ranks).all()
    assert found.min() >= 1
    assert found.max() <= cap
    assert (pair_peaks(load, found) <= pair_peaks(load, start) * (1 + 1e-6)).all()


def test_ladder_counts_gain_where_highest_averages_fall_short():
    load = np.random.default_rng(0).lognormal(0, 1, (8, 128))
    start = capped_replica_counts(load, 320, 160)
    found = search_pair_counts(load, start, ranks=160, cap=160)
    assert pair_peaks(load, start).mean() > 1.04 * pair_peaks(load, found).mean()


def test_highest_average_counts():
    experts, counts = replicate_experts(np.array([[6.0, 3.0, 1.0]], dtype=np.float32), 6)
    assert counts.tolist() == [[3, 2, 1]]
    assert sorted(experts[0].tolist()) == [0, 0, 0, 1, 1, 2]


def test_repair_swaps_before_it_replaces():
    load = np.array([[8.0, 4.0, 2.0, 1.0]])
    swapped = repair_duplicates(np.array([[[0, 0], [1, 2], [0, 3]]]), load)
    assert not duplicate_slots(swapped).any()
    assert sorted(swapped.ravel().tolist()) == [0, 0, 0, 1, 2, 3]
    replaced = repair_duplicates(np.array([[[0, 0], [0, 1], [0, 2], [0, 3]]]), load)
    assert not duplicate_slots(replaced).any()
    assert np.bincount(replaced.ravel()).tolist() == [4, 2, 1, 1]
