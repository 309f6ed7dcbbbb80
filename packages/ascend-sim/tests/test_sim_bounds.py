# SPDX-License-Identifier: Apache-2.0
"""The bounds of `sim_bounds.py` and `sim_attention.py` let right results pass and catch wrong ones, as small as these can be made."""

import pytest
import torch
from sim_attention import attend
from sim_bounds import assert_close, assert_quantised, bound, dot_bound, gamma, unit_roundoff

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def numbers(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_caught(wrong, expected, allowed):
    with pytest.raises(AssertionError, match="beyond their bound"):
        assert_close(wrong, expected, allowed)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products(dtype):
    x, weight, bias = (
        numbers(6, 64, dtype=dtype),
        numbers(64, 40, dtype=dtype, seed=1),
        numbers(40, dtype=dtype, seed=2),
    )
    product = x.double() @ weight.double()
    expected, allowed = (
        product + bias.double(),
        dot_bound(x, weight, product + bias.double(), dtype, more=1, added=bias.double()),
    )
    right = (x.float() @ weight.float() + bias.float()).to(dtype)
    assert_close(right, expected, allowed)
    one_order, other_order = (
        sum(x[:, k].float()[:, None] * weight[k].float() for k in order) for order in (range(64), reversed(range(64)))
    )
    for sums in (one_order, other_order):
        assert_close((sums + bias.float()).to(dtype), expected, allowed)

    assert allowed.max() < expected.abs().max() * max(8 * unit_roundoff(dtype), 64 * 16 * unit_roundoff(torch.float32))
    is_caught((right.double() * 1.01).to(dtype), expected, allowed)  # a wrong scale
    is_caught((x[:, :-1].float() @ weight[:-1].float() + bias.float()).to(dtype), expected, allowed)  # a missing term
    is_caught((x.float() @ weight.float()).to(dtype), expected, allowed)  # no bias
    is_caught(right[[1, 0, 2, 3, 4, 5]], expected, allowed)  # a swapped row
    is_caught(right.clone().index_fill_(0, torch.tensor([3]), 0), expected, allowed)  # a row left out
    is_caught(torch.where(torch.arange(40) == 7, torch.nan, right), expected, allowed)
    is_caught(torch.where(torch.arange(40) == 7, torch.inf, right), expected, allowed)
    if dtype != torch.float32:  # sums in the narrow type
        narrow = torch.zeros(6, 40, dtype=dtype)
        for k in range(64):
            narrow += x[:, k : k + 1] * weight[k]
        is_caught(narrow + bias, expected, allowed)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [16, 64, 576])
def test_attention(dtype, size):
    query, key, value = (
        numbers(rows, heads, size, dtype=dtype, seed=seed)
        for seed, (rows, heads) in enumerate([(5, 4), (40, 2), (40, 2)])
    )
    hidden, scale = torch.ones(5, 40).triu(36).bool(), size**-0.5
    right = attend(query, key, value, scale, hidden)
    allowed = right.allowed(dtype)

    def computed(query=query, key=key, value=value, scale=scale, hidden=hidden):
        """In float32, stored once."""
        key, value = (t.float().repeat_interleave(2, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->qhk", query.float() * scale, key).masked_fill(hidden[:, None], -torch.inf)
        return torch.einsum("qhk,khd->qhd", scores.softmax(-1), value).to(dtype), scores.logsumexp(-1)

    out, lse = computed()
    assert_close(out, right.out, allowed)
    assert_close(lse, right.lse, right.lse_error + bound(right.lse, torch.float32, steps=0))
    assert (right.out_error < 0.01 * right.out.abs().amax()).all()

    is_caught(computed(scale=1.05 * scale)[0], right.out, allowed)
    is_caught(computed(scale=1.001 * scale)[1], right.lse, right.lse_error + bound(right.lse, torch.float32, steps=0))
    is_caught(computed(hidden=torch.zeros(5, 40).bool())[0], right.out, allowed)  # no mask
    is_caught(
        computed(hidden=torch.ones(5, 40).triu(35).bool())[0], right.out, allowed
    )  # a mask that hides one key too many
    is_caught(computed(key=key.flip(1), value=value.flip(1))[0], right.out, allowed)  # two heads swapped
    is_caught(computed(key=key.roll(1, 0))[0], right.out, allowed)  # keys and values of other tokens


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantised_rows(dtype):
    exact = numbers(7, 96, dtype=dtype).double() * 3
    scale = (exact.abs().amax(1) / 127).float()
    quotient = exact / scale.double()[:, None]
    error = gamma(1) * exact.abs()
    assert_quantised(quotient.round().to(torch.int8), scale, exact, error)
    for rows, factor in (
        (quotient.trunc(), 1),  # towards zero
        ((quotient * 1.01).clamp(-127, 127).round(), 1),  # a scale that the rows were not divided by
        (quotient.round()[[1, 0, 2, 3, 4, 5, 6]], 1),
        (quotient.round(), 127 / 128),  # another divisor
    ):
        with pytest.raises(AssertionError, match="beyond their bound"):
            assert_quantised(rows.to(torch.int8), scale * factor, exact, error)


def test_a_bound_holds_for_numbers_that_a_type_cannot_normalise():
    tiny = torch.tensor([3e-8, 1e-7, -6e-5], dtype=torch.float64)
    assert_close(tiny.to(torch.float16), tiny, bound(tiny, torch.float16, steps=0))
    is_caught(torch.zeros(3, dtype=torch.float16), tiny, bound(tiny, torch.float16, steps=0))


def test_a_message_names_the_worst_element():
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"2 of 3 elements beyond their bound, such as 4, which must be 3 within"):
        assert_close(torch.tensor([1.0, 2.1, 4.0]), expected, bound(expected, torch.float32, steps=1))


def test_too_many_roundings_bound_nothing():
    with pytest.raises(AssertionError, match="too many roundings"):
        gamma(200, torch.bfloat16)
