# SPDX-License-Identifier: Apache-2.0
"""Token distributions without communication: which tokens each rank gets, which rows are padding, which arguments are refused."""

import pytest
import torch
from ascend_comm import Solo
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_moe import CommMethod, MoeEnv, make_token_distribution
from ascend_moe.prepare import EqualSlices, GatherOverDp, GatherSequence, SliceOverTp


class Ranks(Solo):
    """A group with a size and no communication: for calls that must not communicate."""

    def __init__(self, world_size: int, rank_in_group: int = 0) -> None:
        super().__init__()
        self.world_size, self.rank_in_group = world_size, rank_in_group
        self.ranks = list(range(world_size))

    def all_gather(self, input_, dim=-1):
        raise AssertionError("nothing to gather")

    reduce_scatter = all_gather


def tokens_of(prepared) -> list[int]:
    """The real tokens, by the number that each has for a hidden state; those with a mask of False must be padding."""
    numbers = prepared.hidden[:, 0]
    real = torch.ones(len(numbers), dtype=torch.bool) if prepared.mask is None else prepared.mask
    assert (numbers[~real] == 0).all()
    assert torch.equal(prepared.routed[0][:, 0], numbers)
    return numbers[real].tolist()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 40), min_size=1, max_size=4), st.booleans())
def test_each_token_is_in_one_slice(tp, counts, equal):
    kind = EqualSlices if equal else SliceOverTp
    sizes = set()
    for count in counts:
        hidden = torch.arange(1, count + 1.0).unsqueeze(1).expand(count, 3)
        seen, masks = [], set()
        for rank in range(tp):
            prepared = kind(Ranks(tp, rank)).prepare(hidden, (hidden,), tokens=counts, mask=None)
            seen += tokens_of(prepared)
            assert hidden[prepared.own, 0].tolist() == tokens_of(prepared)
            sizes.add(len(prepared.hidden))
            masks.add(prepared.mask is None)
            assert len(prepared.hidden) * tp >= count
        assert seen == list(range(1, count + 1)), "each token on one rank, in order"
        if equal:
            assert len(masks) == 1, "a mask on some ranks only"
        else:
            assert len(prepared.hidden) == -(-count // tp)
    if equal:
        assert sizes == {max(1, -(-max(counts) // tp))}


@pytest.mark.parametrize("kind", [EqualSlices, SliceOverTp])
def test_the_callers_mask_is_sliced_with_the_tokens(kind):
    hidden = torch.arange(1.0, 8.0).unsqueeze(1)
    mask = torch.arange(7) < 4
    parts = [kind(Ranks(3, rank)).prepare(hidden, (hidden,), tokens=None, mask=mask) for rank in range(3)]
    assert [part.mask.tolist() for part in parts] == [[True] * 3, [True, False, False], [False] * 3]


def test_a_single_rank_copies_and_sends_nothing():
    hidden = torch.ones(3, 2)
    for distribution in (GatherOverDp(Solo(), Solo()), SliceOverTp(Solo()), EqualSlices(Solo())):
        prepared = distribution.prepare(hidden, (hidden,), tokens=None, mask=None)
        assert prepared.hidden.data_ptr() == hidden.data_ptr()
        assert prepared.mask is None
        assert distribution.finalize(hidden, prepared) is not None
        assert torch.equal(distribution.finalize(hidden, prepared), hidden)


def test_no_token_anywhere_sends_nothing():
    for distribution in (GatherOverDp(Ranks(2), Solo()), GatherSequence(Ranks(2)), SliceOverTp(Ranks(2))):
        none = torch.ones(0, 2)
        prepared = distribution.prepare(none, (none,), tokens=None, mask=None)
        assert len(prepared.hidden) == 0
        assert len(distribution.finalize(none, prepared)) == 0


@pytest.mark.parametrize(
    ("method", "sequence", "kind"),
    [
        (CommMethod.ALL_GATHER, False, GatherOverDp),
        (CommMethod.ALL_GATHER, True, GatherSequence),
        (CommMethod.ALL_TO_ALL_V, False, SliceOverTp),
        (CommMethod.ALL_TO_ALL_V, True, SliceOverTp),
        (CommMethod.MC2, False, EqualSlices),
        (CommMethod.MC2, True, EqualSlices),
    ],
)
def test_the_token_distribution_of_each_method(method, sequence, kind):
    env = MoeEnv(ep=Ranks(4), tp=Ranks(2), dp=Ranks(2), num_slots=8, sequence_parallel=sequence)
    distribution = make_token_distribution(method, env)
    assert type(distribution) is kind
    assert distribution.output_is_reduced is (kind is not GatherOverDp)
    if isinstance(distribution, SliceOverTp):
        rows = 5 if sequence else 3
        five = torch.ones(5, 2)
        assert len(distribution.prepare(five, (), tokens=(5,), mask=None).hidden) == rows


@pytest.mark.parametrize(
    ("distribution", "tokens", "message"),
    [
        (
            GatherOverDp(Ranks(2), Solo()),
            (3,),
            r"tokens=\[3\] must be counts .* for the 2 ranks \[0, 1\], 3 of them on rank 0",
        ),
        (GatherOverDp(Ranks(2), Solo()), (2, 3), r"tokens=\[2, 3\] must be"),
        (GatherSequence(Ranks(2)), (3, -1), r"tokens=\[3, -1\] must be"),
        (
            EqualSlices(Ranks(2)),
            (2, 2),
            r"tokens=\[2, 2\] must be counts of at least 0, and include the 3 tokens of this rank",
        ),
        (EqualSlices(Ranks(2)), (3, -1), r"tokens=\[3, -1\] must be"),
    ],
)
def test_counts_that_do_not_fit(distribution, tokens, message):
    with pytest.raises(ValueError, match=message):
        distribution.prepare(torch.ones(3, 2), (), tokens=tokens, mask=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 0}, "num_slots=0 must be a positive multiple of the 4 ranks of ep"),
        ({"num_slots": 9}, "num_slots=9 must be a positive multiple"),
        ({"tp": Ranks(4)}, r"ep has 4 ranks and must have as many as tp times dp, 4 \* 2"),
        ({"mc2": Ranks(2)}, r"mc2 of ranks \[0, 1\] must have the ranks of ep, \[0, 1, 2, 3\]"),
    ],
)
def test_an_environment_says_what_is_wrong_with_it(change, message):
    fits = {"ep": Ranks(4), "tp": Ranks(2), "dp": Ranks(2), "num_slots": 8}
    assert MoeEnv(**fits).slots_per_rank == 2
    with pytest.raises(ValueError, match=message):
        MoeEnv(**fits | change)
