# SPDX-License-Identifier: Apache-2.0
"""Load counts against a loop, and the two forms of a group list against each other."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ascend_moe import counts_to_cumsum, cumsum_to_counts, slot_load


@st.composite
def routed(draw):
    """Ids of tokens, and which of them are real; padding has ids that exist nowhere."""
    slots = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, 4))
    real = draw(st.lists(st.booleans(), max_size=12))
    slot = st.integers(0, slots - 1)
    ids = [
        draw(st.lists(slot if is_real else st.sampled_from([-1, slots, 0]), min_size=top_k, max_size=top_k))
        for is_real in real
    ]
    return slots, top_k, ids, real


@settings(max_examples=100, deadline=None)
@given(routed(), st.sampled_from([torch.int32, torch.int64]))
def test_load_equals_a_loop(case, dtype):
    slots, top_k, ids, real = case
    want = [0] * slots
    for row, is_real in zip(ids, real, strict=True):
        for slot in row if is_real else ():
            want[slot] += 1
    tensor = torch.tensor(ids, dtype=dtype).reshape(len(ids), top_k)
    got = slot_load(tensor, slots, torch.tensor(real, dtype=torch.bool))
    assert got.dtype == torch.int64
    assert got.tolist() == want
    kept = tensor[torch.tensor(real, dtype=torch.bool)]
    assert torch.equal(slot_load(kept, slots), got)


def test_all_tokens_to_one_slot_and_none():
    ids = torch.full((1000, 2), 3, dtype=torch.int32)
    assert slot_load(ids, 5).tolist() == [0, 0, 0, 2000, 0]
    assert slot_load(ids, 5, torch.zeros(1000, dtype=torch.bool)).tolist() == [0] * 5
    assert slot_load(ids[:0], 5).tolist() == [0] * 5


def test_nothing_waits_for_values():
    with FakeTensorMode():
        load = slot_load(torch.zeros(4, 2, dtype=torch.int32), 6, torch.ones(4, dtype=torch.bool))
        assert load.shape == cumsum_to_counts(counts_to_cumsum(load)).shape == (6,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("counts", [[], [0], [7], [0, 0, 3], [3, 0, 0], [1, 0, 4, 0, 2]])
def test_group_lists_convert_both_ways(counts, dtype):
    cumsum = counts_to_cumsum(torch.tensor(counts, dtype=dtype))
    assert cumsum.tolist() == list(accumulate(counts))
    assert cumsum.dtype == torch.int64
    back = cumsum_to_counts(cumsum.to(dtype))
    assert back.tolist() == counts
    assert back.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "slots", "mask", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int32), 0, None, "num_slots=0 must be at least 1"),
        (torch.zeros(4, dtype=torch.int32), 3, None, "ids of torch.int32 .4. must be"),
        (torch.zeros(4, 2), 3, None, "ids of torch.float32"),
        (torch.zeros(4, 2, dtype=torch.int32), 3, torch.ones(3, dtype=torch.bool), "mask of torch.bool .3. .*must be"),
        (torch.zeros(4, 2, dtype=torch.int32), 3, torch.ones(4, 2, dtype=torch.bool), "mask of torch.bool .4, 2."),
        (torch.zeros(4, 2, dtype=torch.int32), 3, torch.ones(4), "mask of torch.float32"),
        (torch.zeros(4, 2, dtype=torch.int32), 3, torch.ones(4, dtype=torch.bool, device="meta"), "on meta"),
    ],
)
def test_load_says_what_is_wrong(ids, slots, mask, message):
    with pytest.raises(ValueError, match=message):
        slot_load(ids, slots, mask)


def test_group_lists_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"counts of torch.float32 \[3\] must be"):
        counts_to_cumsum(torch.zeros(3))
    with pytest.raises(ValueError, match=r"cumsum of torch.int64 \[3, 1\] must be"):
        cumsum_to_counts(torch.zeros(3, 1, dtype=torch.int64))
