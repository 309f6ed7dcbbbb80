# SPDX-License-Identifier: Apache-2.0
"""Normalisations against float64 mathematics and torch_npu's own meta functions."""

import pytest
import torch
import torch_npu
from sim_bounds import FUNCTION, assert_close, bound

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def same_as_meta(op, results, *tensors, **options):
    meta = op(*(t.to("meta") for t in tensors), **options)
    for got, expected in zip(results, meta, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype


def rms(x, gamma, epsilon):
    """The norm and 1 / sqrt(mean of squares + epsilon), float64, with the roundings of the latter: half of those of a sum of positive squares, then few."""
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    rstd = (x.double().square().mean(dims, keepdim=True) + epsilon).rsqrt()
    return x.double() * rstd * gamma.double(), rstd, gamma.numel() / 2 + FUNCTION + 3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "gamma_shape"),
    [((1, 576), (576,)), ((5, 7, 64), (64,)), ((300, 130), (130,)), ((2, 3, 4, 5), (4, 5)), ((0, 8), (8,))],
)
def test_rms_norm(dtype, shape, gamma_shape):
    x, gamma = torch.randn(shape, dtype=dtype) * 3, torch.randn(gamma_shape, dtype=dtype)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-5)
    same_as_meta(torch_npu.npu_rms_norm, (y, rstd), x, gamma, epsilon=1e-5)
    expected, expected_rstd, steps = rms(x, gamma, 1e-5)
    assert_close(y, expected, bound(expected, dtype, steps=steps + 2))
    assert_close(rstd, expected_rstd, bound(expected_rstd, torch.float32, steps=steps))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_rms_norm_normalises_the_rounded_sum(dtype):
    a, b, gamma = torch.randn(9, 96, dtype=dtype), torch.randn(9, 96, dtype=dtype), torch.randn(96, dtype=dtype)
    results = torch_npu.npu_add_rms_norm(a.npu(), b.npu(), gamma.npu(), 1e-6)
    same_as_meta(torch_npu.npu_add_rms_norm, results, a, b, gamma, epsilon=1e-6)
    y, rstd, total = (r.cpu() for r in results)
    assert torch.equal(total, a + b)
    expected, expected_rstd, steps = rms(a + b, gamma, 1e-6)
    assert_close(y, expected, bound(expected, dtype, steps=steps + 2))
    assert_close(rstd, expected_rstd, bound(expected_rstd, torch.float32, steps=steps))


def test_rms_norm_of_a_view():
    x, gamma = torch.randn(6, 32).npu(), torch.randn(16).npu()
    part = x[:, 8:24]
    assert torch.equal(torch_npu.npu_rms_norm(part, gamma)[0], torch_npu.npu_rms_norm(part.contiguous(), gamma)[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layer_norm_eval(dtype):
    x, weight, bias = torch.randn(4, 3, 48, dtype=dtype), torch.randn(48, dtype=dtype), torch.randn(48, dtype=dtype)
    y = torch_npu.npu_layer_norm_eval(x.npu(), [48], weight.npu(), bias.npu(), 1e-5)
    expected = torch.nn.functional.layer_norm(x.double(), [48], weight.double(), bias.double(), 1e-5)
    # The mean is a sum of 48, the variance one of squares of differences from it, and its root halves that: (x - mean) * rstd * weight + bias.
    mean, rstd = x.double().mean(-1, keepdim=True), (x.double().var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    spread = (x.double().abs() + x.double().abs().mean(-1, keepdim=True) + mean.abs()) * rstd
    magnitude = spread * weight.double().abs() + bias.double().abs()
    assert_close(y, expected, bound(expected, dtype, steps=2 * 48 + FUNCTION + 8, magnitude=magnitude))


def test_rms_norm_rejects_a_gamma_of_another_shape():
    with pytest.raises(RuntimeError, match="npu_rms_norm: gamma must have the shape of input's last dimensions"):
        torch_npu.npu_rms_norm(torch.ones(2, 8).npu(), torch.ones(4).npu())
