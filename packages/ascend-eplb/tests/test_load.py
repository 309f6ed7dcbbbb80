# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

import ascend_eplb as eplb

HISTORY = np.arange(24, dtype=float).reshape(4, 2, 3)


def test_windows_against_their_formulas():
    assert np.allclose(eplb.mean_load(HISTORY), sum(HISTORY) / 4)
    weights = [0.5**3, 0.5**2, 0.5, 1.0]
    assert np.allclose(
        eplb.decayed_load(HISTORY, 1.0), sum(w * h for w, h in zip(weights, HISTORY, strict=True)) / sum(weights)
    )
    assert np.allclose(eplb.peak_load(HISTORY, 2.0), HISTORY.mean(0) + 2 * HISTORY.std(0))
    assert np.allclose(eplb.mean_load(HISTORY[0]), HISTORY[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e31])
def test_wrong_values_are_named(value):
    history = HISTORY.copy()
    history[2, 1, 0] = value
    with pytest.raises(ValueError, match="load of step 2, layer 1, expert 0 is"):
        eplb.mean_load(history)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="half_life=0"):
        eplb.decayed_load(HISTORY, 0)
    with pytest.raises(ValueError, match="risk=-1"):
        eplb.peak_load(HISTORY, -1)
    with pytest.raises(ValueError, match="axes"):
        eplb.mean_load(np.zeros((1, 1, 1, 1)))
    with pytest.raises(TypeError, match="numbers"):
        eplb.mean_load([["x"]])
    for wrong in (np.ones((1, 2), complex), np.array([["1"]]), [[10**400]], [[1, 2], [1]], np.array([["2020"]], "M8")):
        with pytest.raises(TypeError, match="load must be numbers"):
            eplb.rebalance(wrong, ranks=1, slots=2)


def test_window_slides_per_phase():
    window = eplb.LoadWindow(layers=2, num_experts=3, capacity=2)
    assert window.history().shape == (0, 2, 3)
    for step in HISTORY[:3]:
        window.push(step, "decode")
    window.push(HISTORY[3], "prefill")
    assert np.array_equal(window.history("decode"), HISTORY[1:3])
    assert np.array_equal(window.history("prefill"), HISTORY[3:])
    window.push(HISTORY[0], "decode")
    assert np.array_equal(window.history(), HISTORY[[2, 3, 0]])  # in the order of the pushes, whatever the phase
    window.clear()
    assert len(window.history()) == 0
    with pytest.raises(ValueError, match="phase='train' is not one of prefill, decode"):
        window.push(HISTORY[0], "train")
    with pytest.raises(ValueError, match="load has 2 experts"):
        window.push(HISTORY[0, :, :2])
    with pytest.raises(ValueError, match="capacity=0"):
        eplb.LoadWindow(layers=2, num_experts=3, capacity=0)


def test_window_copies_and_windows_share_nothing():
    first, second = (eplb.LoadWindow(layers=1, num_experts=1, capacity=1) for _ in range(2))
    array = np.ones((1, 1))
    first.push(array)
    array[:] = 7
    assert first.history().tolist() == [[[1.0]]]
    assert len(second.history()) == 0


def test_physical_counts_become_logical_ones():
    placement = eplb.Placement([[[7, 2, 0, 3, 5], [6, 1, 4, 7, 2]]])
    ranks = [np.array([[1, 2, 3, 4, 5]]), np.array([[10, 20, 30, 40, 50]])]
    merged = eplb.merge_ranks(ranks)
    assert merged.shape == (1, 2, 5)
    expected = np.zeros((1, 8))
    for rank in range(2):
        for slot in range(5):
            expected[0, placement.physical_to_logical[0, rank, slot]] += ranks[rank][0, slot]
    assert np.array_equal(eplb.logical_load(placement, merged), expected)
    assert np.array_equal(eplb.logical_load(placement, merged.reshape(1, 10)), expected)
    with pytest.raises(ValueError, match="do not fit a placement"):
        eplb.logical_load(placement, merged[:, :1])
    with pytest.raises(ValueError, match="counts of rank 1"):
        eplb.merge_ranks([ranks[0], ranks[1][:, :3]])
    with pytest.raises(ValueError, match="no rank"):
        eplb.merge_ranks([])


def test_metrics():
    placement = eplb.Placement([[[0, 1], [2, 0]], [[0, 1], [2, 0]]])
    load = np.array([[4.0, 1.0, 5.0], [0.0, 0.0, 0.0]])
    assert eplb.rank_loads(placement, load).tolist() == [[3.0, 7.0], [0.0, 0.0]]
    assert np.allclose(eplb.balancedness(placement, load), [5 / 7, 1.0])
    assert np.allclose(eplb.peak_to_mean(placement, load), [7 / 5, 1.0])
    other = eplb.Placement([[[2, 1], [0, 2]], [[1, 0], [0, 2]]])
    assert eplb.moved_slots(placement, other).tolist() == [1, 0]
    with pytest.raises(ValueError, match="load has 2 layers, the placement 1"):
        eplb.rank_loads(eplb.Placement([[[0, 1], [2, 0]]]), load)
