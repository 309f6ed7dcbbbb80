# SPDX-License-Identifier: Apache-2.0
"""The statistics of rounding errors themselves, without engines."""

import pytest
import torch
from rounding import OtherOrder, assert_as_near, assert_caught, excess


def heavy_tailed(generator, *shape):
    """Errors as they are seen: of very different size from position to position, now and then very large."""
    size = torch.randn(1, shape[-1], generator=generator).exp()
    return (size * torch.randn(shape, generator=generator) ** 3).abs()


def test_right_implementations_pass():
    """Two thousand of them, with as few as 40 positions."""
    generator = torch.Generator().manual_seed(0)
    for positions in (40, 600):
        for _ in range(1000):
            first, *others = heavy_tailed(generator, 4, positions)
            assert excess(first, torch.stack(others)) < 1


@pytest.mark.parametrize("factor", [2, 10, float("inf"), float("nan")])
def test_greater_errors_are_caught(factor):
    first, *others = torch.randn(4, 600, generator=torch.Generator().manual_seed(1)).abs()
    reference = torch.stack(others)
    assert_as_near(first, reference)
    assert_caught(first * factor, reference)
    with pytest.raises(AssertionError):
        assert_as_near(first * factor, reference)
    with pytest.raises(AssertionError):
        assert_caught(first, reference)


def test_smaller_errors_pass():
    generator = torch.Generator().manual_seed(2)
    assert_as_near(torch.zeros(100), torch.rand(3, 100, generator=generator))


@pytest.mark.parametrize("parts", [1, 3])
def test_another_order_is_the_same_product(parts):
    """To within 2^-8 for each rounding to bfloat16: of the partial products together, of each sum of two, and of the bias's sum."""
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 96), (40, 96), (40,)))
    exact = x.double() @ weight.double().mT
    sizes = x.double().abs() @ weight.double().abs().mT + bias.double().abs()
    with OtherOrder(0, parts):
        product = torch.nn.functional.linear(x, weight)
        with_bias = torch.nn.functional.linear(x, weight, bias=bias)
        assert torch.nn.functional.relu(x).equal(x.relu())
    assert product.dtype == torch.bfloat16
    assert ((product.double() - exact).abs() <= 1.01 * parts * 2**-8 * sizes).all()
    assert ((with_bias.double() - exact - bias).abs() <= 1.01 * (parts + 1) * 2**-8 * sizes).all()
    with OtherOrder(1, 3):
        assert not torch.nn.functional.linear(x, weight).equal(product)


def test_a_product_in_float32_is_rounded_too():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with OtherOrder(0):
        product = torch.nn.functional.linear(x, weight)
    assert product.dtype == torch.float32
    assert product.equal(product.bfloat16().float())
