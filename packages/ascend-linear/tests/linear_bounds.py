# SPDX-License-Identifier: Apache-2.0
"""How far a product over ranks may be from float64 mathematics: bounds that follow from rounding, so that they hold on every processor.

Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3: k roundings change a number by at most gamma(k) = k u / (1 - k u), u the unit
roundoff of the type, and a sum of n products in any order is off by at most gamma(n) times the sum of their magnitudes. Kernels compute in float32 and round
to the layer's type when they store.
"""

import torch
from torch import Tensor

__all__ = ["assert_close", "gamma", "w8a8"]


def gamma(roundings: int, dtype: torch.dtype = torch.float32) -> float:
    """What so many roundings do to a number, relatively."""
    change = roundings * torch.finfo(dtype).eps / 2
    assert change < 0.5, "too many roundings for a bound that means anything"
    return change / (1 - change)


def assert_close(actual: Tensor, expected: Tensor, allowed: Tensor, what: str = "the product") -> None:
    """Every element within its bound; NaN is not."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.detach().to(expected.device).double() - expected).abs()
    assert (difference <= allowed).all(), f"not {what}: {(difference - allowed).max().item():.3g} beyond its bound"


def w8a8(
    x: Tensor, weight: Tensor, bias: Tensor, step: Tensor, offset: Tensor, ranks: int, dtype: torch.dtype
) -> Tensor:
    """How far a quantised layer may be from the product of its very input with its dequantised weight, `[T, out]`.

    Args:
        x: float64 `[T, in]`, the numbers that the layer gets in `dtype`.
        weight: float64 `[out, in]`, dequantised.
        bias: float64 `[out]`.
        step: float64 `[T, 1]` or `[1]`, the distance of two quantised inputs.
        offset: float64 `[1]`, the quantised value of 0, in steps.
        ranks: over which the input features are spread.
        dtype: of the result and of partial sums.
    """
    spent = weight.abs().sum(1)
    shifted = (
        x.abs() + step * (offset.abs() + 1)
    ) @ weight.abs().t()  # at least the sum of the quantised terms' magnitudes
    # An input is rounded to the nearest step, after its quotient (of a reciprocal in `dtype`) was rounded in float32.
    inputs = (0.5 * step + gamma(1, dtype) * x.abs() + gamma(4) * (x.abs() + step * offset.abs())) @ weight.abs().t()
    # The bias of a static layer is a whole number of the product's step, and takes the inputs' offset back on one rank.
    biases = bias.abs() + step * offset.abs() * spent
    whole_bias = 0.5 * step * weight.abs().amax(1) / 127 + gamma(4) * biases
    # The exact integer sum becomes float32, and is scaled twice. Then each rank's part, a bias, and each sum of two parts are stored.
    stored = gamma(4) * shifted + gamma(ranks + 3, dtype) * (shifted + biases)
    return inputs + whole_bias + stored
