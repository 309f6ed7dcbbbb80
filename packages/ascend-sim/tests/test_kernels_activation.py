# SPDX-License-Identifier: Apache-2.0
"""Activations against float64 mathematics and torch_npu's own meta functions."""

import pytest
import torch
import torch_npu
from sim_bounds import FUNCTION, assert_close, bound

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((1, 3072), -1), ((5, 6, 22), -1), ((4, 6, 10), 1), ((6,), 0), ((0, 4), -1)]
)
def test_swiglu(dtype, shape, dim):
    x = (torch.randn(shape, dtype=dtype) * 20).clamp(-80, 80)  # beyond, exp(-x) is no float32
    y = torch_npu.npu_swiglu(x.npu(), dim)
    meta = torch_npu.npu_swiglu(x.to("meta"), dim)
    assert y.shape == meta.shape
    assert y.dtype == meta.dtype
    gate, up = x.double().chunk(2, dim)
    expected = torch.nn.functional.silu(gate) * up
    assert_close(y, expected, bound(expected, dtype, steps=FUNCTION + 4))  # exp, 1 +, 1 /, two products


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("groups", "dim"), [(None, -1), ([2, 0, 3], -1), ([100], -1), (None, 1)])
def test_clipped_swiglu(dtype, interleaved, groups, dim):
    x = torch.randn(8, 12, 4, dtype=dtype) * 8 if dim == 1 else torch.randn(8, 24, dtype=dtype) * 8
    index = None if groups is None else torch.tensor(groups).npu()
    y = torch_npu.npu_clipped_swiglu(x.npu(), group_index=index, dim=dim, interleaved=interleaved).cpu()
    assert y.shape == torch_npu.npu_clipped_swiglu(x.to("meta"), dim=dim, interleaved=interleaved).shape
    flat = x.double().reshape(8, -1)
    gate, up = (flat[:, ::2], flat[:, 1::2]) if interleaved else flat.chunk(2, 1)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    weighted = gate * torch.sigmoid(1.702 * gate)
    expected = weighted * (up + 1)
    # As SwiGLU, with an argument that is rounded twice (1.702 and the product), and up + 1, which may cancel.
    steps = FUNCTION + 5 + 2 * (1.702 * gate).abs()
    allowed = bound(expected, dtype, steps=steps, magnitude=weighted.abs() * (up.abs() + 1))
    if groups is not None:
        expected[sum(groups) :] = 0
    assert_close(y, expected.view(y.shape), allowed.view(y.shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(dtype, approximate):
    x = torch.randn(7, 33, dtype=dtype) * 3
    y = torch_npu.npu_gelu(x.npu(), approximate=approximate)
    expected = torch.nn.functional.gelu(x.double(), approximate=approximate)
    # x / 2 * (1 + erf or tanh), which cancels for x < 0; the argument has at most 7 roundings, and the function's slope times its argument is below 1.
    assert_close(y, expected, bound(expected, dtype, steps=FUNCTION + 10, magnitude=x.double().abs()))


def test_extremes_stay_finite():
    x = torch.tensor([[-3e38, -1e4, -90.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(torch_npu.npu_swiglu(x.npu()).cpu()[0, 3:], torch.tensor([90.0, 1e4]))
    assert torch.all(torch_npu.npu_swiglu(x.npu()).cpu()[0, 1:3].abs() < 1e-30)


def test_rejections():
    with pytest.raises(RuntimeError, match="npu_swiglu: dimension 1 must be even, got 3"):
        torch_npu.npu_swiglu(torch.ones(2, 3).npu())
    with pytest.raises(RuntimeError, match="npu_swiglu: data type must be float16, bfloat16 or float32, got Int"):
        torch_npu.npu_swiglu(torch.ones(2, 4, dtype=torch.int32).npu())
