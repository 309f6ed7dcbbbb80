# SPDX-License-Identifier: Apache-2.0
"""The bounds of `moe_bounds.py` let a right layer pass, in any order of its sums, and catch wrong ones."""

import pytest
import torch
from moe_bounds import assert_close, float_layer, w8a8_layer
from moe_oracle import act, gates, normal

from ascend_moe import Activation, RoutingSpec, quantise_weights

T, E, H, I = 11, 8, 64, 64  # noqa: E741
SPEC = RoutingSpec(top_k=2, scoring="softmax", renormalise=True)
X, LOGITS = normal(T, H, seed=20), normal(T, E, seed=21)
W13, W2 = normal(E, H, 2 * I, seed=1) / H**0.5, normal(E, I, H, seed=2) / I**0.5
GATE = gates(LOGITS, SPEC)


def layer(x, gate, w13, w2, activation, order=None):
    """In x's type, which is rounded to after each product and each partial sum; experts in any order."""
    out = torch.zeros_like(x)
    for e in order or range(E):
        wide = (x.float() @ w13[e].float()).to(x.dtype)
        hidden = act(wide.float(), activation).to(x.dtype)
        out = out + gate[:, e : e + 1].to(x.dtype) * (hidden.float() @ w2[e].float()).to(x.dtype)
    return out


def is_caught(wrong, expected):
    with pytest.raises(AssertionError, match="beyond their bound"):
        assert_close(wrong, expected.out, expected.allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [Activation(), Activation(limit=1.0)], ids=["swiglu", "clipped"])
def test_float_layers(dtype, activation):
    x, w13, w2 = X.to(dtype), W13.to(dtype), W2.to(dtype)
    expected = float_layer(x, GATE, w13, w2, activation, dtype)
    right = layer(x, GATE, w13, w2, activation)
    for result in (right, layer(x, GATE, w13, w2, activation, order=range(E - 1, -1, -1))):
        assert_close(result, expected.out, expected.allowed)

    is_caught(right * 1.25, expected)  # scaled twice
    is_caught(right[[1, 0, *range(2, T)]], expected)  # two tokens swapped
    is_caught(layer(x, GATE, w13, w2.roll(1, 0), activation), expected)  # another expert's down projection
    is_caught(
        layer(x, GATE, torch.cat([w13[:, :, I:], w13[:, :, :I]], 2), w2, activation), expected
    )  # gate and up swapped
    is_caught(layer(x, GATE, w13, w2, Activation(gate="gelu")), expected)
    is_caught(
        layer(x, GATE.masked_fill(GATE.amax(1, keepdim=True) == GATE, 0), w13, w2, activation), expected
    )  # an expert left out
    is_caught(layer(x, GATE.roll(1, 1), w13, w2, activation), expected)  # slots off by one
    is_caught(torch.where(torch.arange(H) == 3, torch.nan, right), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_w8a8_layers(dtype):
    (q13, s13), (q2, s2) = quantise_weights(W13), quantise_weights(W2)
    s2 = s2.to(dtype)
    wide_s2 = s2.float()
    x, activation = X.to(dtype), Activation()
    expected = w8a8_layer(x, GATE, q13, s13, q2, s2, activation, dtype)

    def rounded(rows):
        scale = rows.abs().amax(1, keepdim=True) / 127
        return (rows / scale).round(), scale

    def computed(w13_scale=s13, w2_scale=wide_s2, quantise=rounded):
        out = torch.zeros_like(x)
        for e in range(E):
            rows, scale = quantise(x.float())
            hidden = act((rows @ q13[e].float()) * w13_scale[e] * scale, activation)
            rows, scale = quantise(hidden)
            result = ((rows @ q2[e].float()) * w2_scale[e] * scale).to(dtype)
            out = out + GATE[:, e : e + 1].to(dtype) * result
        return out

    right = computed()
    assert_close(right, expected.out, expected.allowed)
    is_caught(right * 1.25, expected)
    is_caught(computed(w13_scale=s13.roll(1, 0)), expected)  # another expert's scales
    is_caught(computed(w2_scale=s2.float().mean(1, keepdim=True)), expected)  # one scale for all channels
    is_caught(computed(quantise=lambda rows: (rows / (rows.abs().amax() / 127), rows.abs().amax() / 100)), expected)
    coarse = computed(
        quantise=lambda rows: (
            (rows / (rows.abs().amax(1, keepdim=True) / 7)).round(),
            rows.abs().amax(1, keepdim=True) / 7,
        )
    )
    is_caught(coarse, expected)  # 4 bits
    if dtype == torch.float32:
        is_caught(
            layer(x, GATE, q13 * s13.unsqueeze(1), q2 * s2.unsqueeze(1), activation), expected
        )  # not quantised at all
