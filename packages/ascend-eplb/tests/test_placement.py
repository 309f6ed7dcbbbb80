# SPDX-License-Identifier: Apache-2.0
import pickle

import numpy as np
import pytest

from ascend_eplb import Placement, checkpoint, from_physical_to_logical, select_layers, spread


@pytest.mark.parametrize(
    ("layout", "experts", "ranks", "redundant", "expected"),
    [
        (spread, 8, 2, 2, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]),
        (spread, 8, 4, 4, [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 0]]),
        (spread, 10, 4, 2, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [8, 9, 0]]),
        (spread, 3, 1, 0, [[0, 1, 2]]),
        (checkpoint, 8, 2, 2, [[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]]),
        (checkpoint, 8, 2, 0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (checkpoint, 3, 3, 6, [[0, 1, 2], [0, 1, 2], [0, 1, 2]]),
    ],
)
def test_layouts(layout, experts, ranks, redundant, expected):
    placement = layout(num_experts=experts, ranks=ranks, redundant=redundant, layers=2)
    assert placement.physical_to_logical.tolist() == [expected, expected]
    assert placement.physical_to_logical.dtype == np.int32


def slow_spread(experts, ranks, redundant):
    """The rule as it is written down, word for word."""
    lists = [part.tolist() for part in np.array_split(np.arange(experts), ranks)]
    for index in range(redundant):
        rank = ranks - 1 - index % ranks
        lists[rank].append((lists[rank][-1] + 1) % experts)
    return lists


def test_spread_against_the_rule_in_words():
    for ranks in range(1, 9):
        for experts in range(ranks, 26):
            for redundant in range(ranks * experts - experts + 1):
                if (experts + redundant) % ranks == 0:
                    found = spread(num_experts=experts, ranks=ranks, redundant=redundant)
                    assert found.physical_to_logical[0].tolist() == slow_spread(experts, ranks, redundant)


@pytest.mark.parametrize("layout", [spread, checkpoint])
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((8, 2, 10, 1), r"redundant=10 .* two replicas .* at most redundant=8"),
        ((8, 3, 0, 1), r"do not divide over ranks=3; redundant=1 would"),
        ((0, 1, 0, 1), r"num_experts=0 must be at least 1"),
        ((8, 0, 0, 1), r"ranks=0 must be at least 1"),
        ((8, 2, -2, 1), r"redundant=-2 must be at least 0"),
        ((8, 2, 0, 0), r"layers=0 must be at least 1"),
    ],
)
def test_layouts_refuse_what_cannot_be(layout, sizes, words):
    with pytest.raises(ValueError, match=words):
        layout(num_experts=sizes[0], ranks=sizes[1], redundant=sizes[2], layers=sizes[3])


@pytest.mark.parametrize(("name", "value"), [("num_experts", 8.0), ("ranks", "2"), ("redundant", True)])
def test_layouts_refuse_other_types(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        spread(**{"num_experts": 8, "ranks": 2, **{name: value}})


GOOD = [[[0, 1], [2, 3]], [[3, 1], [0, 2]]]


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ((1, 0, 1), 3, r"layer 1, rank 0, slot 1: expert 3 is already in slot 0"),
        ((0, 1, 0), 4, r"layer 0, rank 1, slot 0: expert 4 is not in 0\.\.3"),
        ((1, 1, 1), -1, r"layer 1, rank 1, slot 1: expert -1 is not in 0\.\.3"),
        ((0, 0, 1), 2, r"layer 0: expert 1 of 0\.\.3 is on no rank"),
    ],
)
def test_errors_name_layer_rank_slot_and_value(where, value, words):
    ids = np.array(GOOD)
    ids[where] = value
    with pytest.raises(ValueError, match=words):
        Placement(ids, 4)


def test_layer_numbers():
    placement = Placement(np.array(GOOD), 4, (3, 60))
    assert placement.layer(60).tolist() == GOOD[1]
    with pytest.raises(KeyError, match=r"layer_id=1 is not in this placement, which has layers 3, 60"):
        placement.layer(1)
    ids = np.array(GOOD)
    ids[1, 0, 0] = 1
    with pytest.raises(ValueError, match="layer 60, rank 0, slot 1"):
        Placement(ids, 4, (3, 60))
    for wrong in ((3,), (4, 3), (-1, 0), (3, 3)):
        with pytest.raises(ValueError, match="layer_ids"):
            Placement(np.array(GOOD), 4, wrong)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([[[0.0]]], TypeError),
        ([[0]], ValueError),
        (np.zeros((1, 0, 1), int), ValueError),
        ([[[2**40]]], ValueError),
        ([[[1 - 2**32]]], ValueError),
    ],
)
def test_refuses_other_arrays(ids, error):
    with pytest.raises(error, match="physical_to_logical"):
        Placement(ids)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[[0, 1], [2]]], "layer 0, rank 1 has 1 slots, but layer 0, rank 0 has 2"),
        ([[[0, 1], [2, 3]], [[0, 1], [2, 3, 1]]], "layer 1, rank 1 has 3 slots, but layer 0, rank 0 has 2"),
        ([[[0, 1], [2, 3]], [[0, 1]]], "layer 1 has 1 ranks, but layer 0 has 2"),
        ([[[0, 1], 2]], "physical_to_logical is no array"),
    ],
)
def test_unequal_slots_are_named(ids, words):
    with pytest.raises(ValueError, match=words):
        Placement(ids)


@pytest.mark.parametrize(
    ("more", "words"), [((4.0,), "num_experts must be an integer"), ((4, (0, 1.5)), "layer_ids must be an integer")]
)
def test_numbers_of_another_type_are_refused(more, words):
    with pytest.raises(TypeError, match=words):
        Placement(np.array(GOOD), *more)
    assert Placement(np.array(GOOD), np.int64(4), (np.int32(2), np.int64(5))).layer_ids == (2, 5)


def test_an_absurd_id_or_number_of_experts_is_refused_without_counting():
    for ids, experts in (([[[0, 2**31 - 2]]], 0), ([[[0, 1]]], 2**31 - 1)):
        with pytest.raises(ValueError, match=r"num_experts=2147483647 .* more than the 2 slots"):
            Placement(ids, experts)


@pytest.mark.parametrize("layout", [spread, checkpoint])
@pytest.mark.parametrize(
    "sizes",
    [(256, 16, 0, 2**31), (2**40, 1, 0, 1), (8, 2, 2**40, 1), (8, 2**40, 0, 1), (2**22, 2, 2, 1), (8, 2, 0, 2**19 + 1)],
)
def test_absurd_sizes_are_refused_before_anything_is_made(layout, sizes):
    experts, ranks, redundant, layers = sizes
    with pytest.raises(
        ValueError, match=rf"num_experts={experts}, redundant={redundant}, ranks={ranks}, layers={layers}: .* 4194304"
    ):
        layout(num_experts=experts, ranks=ranks, redundant=redundant, layers=layers)


def test_the_largest_placement_is_one_of_4194304_slots():
    ids = np.broadcast_to(np.arange(1 << 11), (1 << 11, 1, 1 << 11))
    assert Placement(ids).layers == 1 << 11
    with pytest.raises(
        ValueError, match=r"shape \(2049, 1, 2048\): 4196352 slots over all layers are more than the 4194304"
    ):
        Placement(np.broadcast_to(np.arange(1 << 11), ((1 << 11) + 1, 1, 1 << 11)))
    with pytest.raises(ValueError, match="slots over all layers, at 8 a layer, are more than"):
        select_layers(spread(num_experts=8, ranks=2), 10**9)


def test_is_a_frozen_value():
    source = np.array(GOOD)
    placement = Placement(source)
    source[0, 0, 0] = 3
    assert placement.physical_to_logical[0, 0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.physical_to_logical[0, 0, 0] = 1
    same = Placement(np.array(GOOD, dtype=np.int64), 4)
    assert placement == same
    assert hash(placement) == hash(same)
    assert placement != Placement(np.array(GOOD), 4, (1, 2))
    assert placement != 3
    assert pickle.loads(pickle.dumps(placement)) == placement
    assert repr(placement) == "Placement(layers=2, experts=4, ranks=2, slots=4, redundant=0)"


def test_from_flat_slots():
    assert from_physical_to_logical([0, 1, 2, 3], ranks=2).physical_to_logical.tolist() == [[[0, 1], [2, 3]]]
    with pytest.raises(ValueError, match="ranks=3 does not divide the 4 slots"):
        from_physical_to_logical([[0, 1, 2, 3]], ranks=3)
    with pytest.raises(ValueError, match="axes"):
        from_physical_to_logical([[[0]]], ranks=1)


def test_replicas():
    placement = spread(num_experts=8, ranks=2, redundant=2)
    assert placement.replicas.tolist() == [[2, 1, 1, 1, 2, 1, 1, 1]]
    assert placement.redundant == 2
