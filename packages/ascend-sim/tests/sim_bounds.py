# SPDX-License-Identifier: Apache-2.0
"""How far a result may be from float64 mathematics: bounds that follow from rounding, so that they hold on every processor.

Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3: one rounding changes a number by at most its unit roundoff u, relatively.
So k roundings one after another change it by at most gamma(k) = k u / (1 - k u), and a sum of n products, in whatever order and with or without
fused multiply-add, is off by at most gamma(n) times the sum of the products' magnitudes. The kernels here compute in float32 and round once when they
store, unless a test says otherwise.
"""

import torch
from torch import Tensor

__all__ = ["FUNCTION", "assert_close", "assert_quantised", "bound", "dot_bound", "gamma", "unit_roundoff"]

FUNCTION = 8
"""Roundings that stand for one call of exp, log, tanh, erf, sigmoid or sqrt in float32: 4 units in the last place, which the vectorised functions of the
C library and of PyTorch keep (the simulator's own exp keeps 2), and a unit in the last place is at most 2 u."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance of 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def gamma(roundings: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """What so many roundings do to a number, relatively; float64."""
    change = torch.as_tensor(roundings, dtype=torch.float64) * unit_roundoff(dtype)
    assert not (change >= 0.5).any(), "too many roundings for a bound that means anything"
    return change / (1 - change)


def bound(
    expected: Tensor, dtype: torch.dtype, *, steps: Tensor | float, magnitude: Tensor | None = None, stores: int = 1
) -> Tensor:
    """How far a result in `dtype` may be from `expected`, element by element.

    Args:
        expected: float64, computed from the very numbers that the kernel got.
        steps: roundings in float32 on the way to the result. The functions on the way count `FUNCTION` each, and a function whose argument was rounded k times
            counts k times its condition number more (|x| for exp).
        magnitude: what these roundings are relative to: for sums the sum of the magnitudes of the addends. None: of the result, where nothing cancels.
        stores: roundings to `dtype`, each of a number as large as the result.
    """
    computed = gamma(steps) * (expected.abs() if magnitude is None else magnitude)
    about = torch.finfo(dtype)
    smallest = max(
        about.smallest_normal * about.eps, torch.finfo(torch.float32).smallest_normal
    )  # also where small numbers are flushed to 0
    rounded = gamma(stores, dtype) if stores else torch.zeros((), dtype=torch.float64)
    return computed * (1 + rounded) + rounded * expected.abs() + smallest


def dot_bound(
    left: Tensor,
    right: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    *,
    more: int = 0,
    added: Tensor | float = 0.0,
    stores: int = 1,
) -> Tensor:
    """`bound` of `left @ right + added`, with `more` roundings after the sum."""
    magnitude = left.double().abs() @ right.double().abs() + abs(added)
    return bound(expected, dtype, steps=left.shape[-1] + more, magnitude=magnitude, stores=stores)


def assert_close(actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Every element within its bound; infinities in the same places, and no NaN but where one is expected."""
    found = actual.detach().cpu().double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    same = (found == expected) | (found.isnan() & expected.isnan())
    wrong = ~same & ~((found - expected).abs() <= allowed)
    if wrong.any():
        worst = (
            ((found - expected).abs() / allowed).masked_fill(~wrong, 0).nan_to_num(torch.inf).flatten().argmax().item()
        )
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements beyond their bound, such as {found.flatten()[worst]:.9g}, which must be "
            f"{expected.flatten()[worst]:.9g} within {allowed.expand_as(expected).flatten()[worst]:.3g}"
        )


def assert_quantised(rows: Tensor, scale: Tensor, expected: Tensor, error: Tensor) -> None:
    """int8 rows `[A, n]` and their scales `[A]`, which are max |row| / 127, of float64 rows known within `error` `[A, n]`.

    A row's scale has the error of its largest element and one rounding of the division; an element is rounded to the nearest multiple of the scale, that is within
    half a scale, after the division has rounded a quotient of at most 127.
    """
    largest = error.amax(1) if error.numel() else error.new_zeros(len(error))
    assert_close(
        scale, expected.abs().amax(1) / 127, bound(expected.abs().amax(1) / 127, torch.float32, steps=1) + largest / 127
    )
    step = scale.double().unsqueeze(1)
    assert_close(rows.double() * step, expected, step * (0.5 + 127 * gamma(2)) + error)
