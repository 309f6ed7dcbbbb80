# SPDX-License-Identifier: Apache-2.0
"""How far a layer may be from the dense layer in float64: bounds that follow from rounding, so that they hold on every processor.

Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3: k roundings change a number by at most gamma(k) = k u / (1 - k u), u the unit roundoff of the
type, and a sum of n products in any order is off by at most gamma(n) times the sum of their magnitudes. Kernels compute in float32 and round to the layer's type
when they store: after each product, after the activation, and after each partial sum of a token's experts.

Legend: T tokens, E experts, H hidden, I intermediate.
"""

from dataclasses import dataclass

import torch
from moe_oracle import act
from torch import Tensor

from ascend_moe import Activation

__all__ = ["FUNCTION", "Layer", "assert_close", "float_layer", "gamma", "routing_steps", "w8a8_layer"]

FUNCTION = 8
"""Roundings that stand for one exp, log, tanh, erf or sqrt in float32: 4 units in the last place, each at most 2 u."""

PARTIAL_SUMS = 12
"""Stores of partial sums of a token's experts: on each of at most 8 ranks, in the sum over these, of its own rows, and after the sum over TP."""

WEIGHTS = 512
"""Roundings in float32 of a routing weight here and of the same one in the reference: a softmax over 8 experts whose logits differ by at most 100, twice."""


def gamma(roundings: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """What so many roundings do to a number, relatively; float64."""
    change = torch.as_tensor(roundings, dtype=torch.float64) * (torch.finfo(dtype).eps / 2)
    assert not (change >= 0.5).any(), "too many roundings for a bound that means anything"
    return change / (1 - change)


def routing_steps(experts: int, spread: float) -> float:
    """Roundings of a score: exp of a difference from the largest logit, a sum of exponentials, a division; for softplus two functions and a root."""
    return 3 * FUNCTION + experts + spread + 4


def assert_close(actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Every element within its bound; NaN is not."""
    found = actual.detach().cpu().double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    wrong = ~((found - expected).abs() <= allowed)
    if wrong.any():
        excess = ((found - expected).abs() / allowed).nan_to_num(torch.inf).max().item()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements beyond their bound, up to {excess:.3g} times as far as allowed"
        )


@dataclass(frozen=True)
class Layer:
    """The dense layer's output and what rounding may add to it, float64 `[T, H]` each."""

    out: Tensor
    allowed: Tensor

    def plus(self, added: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype) -> "Layer":
        """With another sum of so many terms added (a shared expert), which was stored, as were its partial sums."""
        error = gamma(terms) * magnitude + gamma(PARTIAL_SUMS, dtype) * (magnitude + self.out.abs())
        return Layer(self.out + added, self.allowed + error)

    def split(self, counts: tuple[int, ...]) -> list["Layer"]:
        return [Layer(*parts) for parts in zip(self.out.split(counts), self.allowed.split(counts), strict=True)]


def float_layer(
    x: Tensor,
    gate: Tensor,
    w13: Tensor,
    w2: Tensor,
    activation: Activation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """Every expert on every token, weighted by `gate` `[T, E]`. Arguments are the very numbers that the layer gets."""
    x, parts = x.double(), []
    for up, down in zip(w13.double(), w2.double(), strict=True):
        wide = x @ up
        wide_error = gamma(len(up)) * (x.abs() @ up.abs()) + gamma(1, dtype) * wide.abs()
        hidden, hidden_error = _activated(wide, wide_error, activation or Activation())
        hidden_error = hidden_error + gamma(1, dtype) * hidden.abs()
        result = hidden @ down
        error = (
            hidden_error @ down.abs() + gamma(len(down)) * (hidden.abs() @ down.abs()) + gamma(1, dtype) * result.abs()
        )
        parts.append((result, error))
    return _combined(parts, gate, dtype)


def w8a8_layer(
    x: Tensor,
    gate: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    activation: Activation,
    dtype: torch.dtype,
) -> Layer:
    """The same where rows become int8 before each product, by their own scales. The integer products are exact.

    An element that lies so near the middle between two integers that float32 may round it either way is off by one of its row's scales.
    """
    rows, scale, flips = _quantised(x.double(), torch.zeros_like(x, dtype=torch.float64))
    parts = []
    for up, up_scale, down, down_scale in zip(w13.double(), s13.double(), w2.double(), s2.double(), strict=True):
        wide = (rows @ up) * scale * up_scale
        wide_error = gamma(4) * wide.abs() + (flips @ up.abs()) * scale * up_scale
        if not activation.is_swiglu:  # stored between the product and the activation
            wide_error = wide_error + gamma(1, dtype) * wide.abs() + gamma(1, s2.dtype) * wide.abs()
        hidden, hidden_error = _activated(wide, wide_error, activation)
        if not activation.is_swiglu:
            hidden_error = hidden_error + gamma(1, dtype) * hidden.abs()
        integers, hidden_scale, hidden_flips = _quantised(hidden, hidden_error)
        result = (integers @ down) * hidden_scale * down_scale
        of_scale = hidden_error.amax(1, keepdim=True) / hidden.abs().amax(1, keepdim=True).clamp(min=1e-30)
        error = (hidden_flips @ down.abs()) * hidden_scale * down_scale + (
            gamma(4) + of_scale + gamma(1, dtype)
        ) * result.abs()
        parts.append((result, error))
    return _combined(parts, gate, dtype)


def _quantised(x: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of rows `[A, n]`, their scales `[A, 1]`, and 1 where rounding may go the other way."""
    scale = x.abs().amax(1, keepdim=True) / 127
    quotient = x / scale.clamp(min=1e-30)
    slack = (error + error.amax(1, keepdim=True) * quotient.abs() / 127) / scale.clamp(min=1e-30) + 127 * gamma(4)
    from_the_middle = ((quotient - quotient.floor()) - 0.5).abs()
    return quotient.round(), scale, (from_the_middle <= slack).double()


def _activated(wide: Tensor, error: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The activation and its error. All gates have a slope of at most 1.13 (SiLU 1.1, GELU 1.13), GPT-OSS's at most 1.1 as well."""
    if activation.interleaved:
        gate_error, up_error, gate, up = error[:, ::2], error[:, 1::2], wide[:, ::2], wide[:, 1::2]
    else:
        (gate_error, up_error), (gate, up) = error.chunk(2, 1), wide.chunk(2, 1)
    factor = up.abs() + activation.up_bias + up_error
    gated = (
        gate.abs() if activation.gate != "silu" else gate.abs() * torch.sigmoid(gate)
    )  # 1 + erf and 1 + tanh cancel, 1 + exp does not
    if activation.limit is not None:
        gated = gate.abs()
    own = gamma(FUNCTION + 12 + 4 * gate.abs()) * gated * factor
    return act(wide, activation), 1.13 * gate_error * factor + (gated + 1.13 * gate_error) * up_error + own


def _combined(parts: list[tuple[Tensor, Tensor]], gate: Tensor, dtype: torch.dtype) -> Layer:
    """The sum over experts, weighted; weights are rounded to the layer's type, and partial sums are stored in it."""
    out = sum(gate[:, e : e + 1] * result for e, (result, _) in enumerate(parts))
    error = sum(gate[:, e : e + 1] * one for e, (_, one) in enumerate(parts))
    magnitude = sum(gate[:, e : e + 1] * result.abs() for e, (result, _) in enumerate(parts))
    allowed = error * (1 + gamma(PARTIAL_SUMS, dtype)) + (gamma(WEIGHTS) + gamma(PARTIAL_SUMS + 1, dtype)) * magnitude
    return Layer(out, allowed + torch.finfo(torch.float32).smallest_normal)
