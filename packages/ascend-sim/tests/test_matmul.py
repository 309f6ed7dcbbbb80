# SPDX-License-Identifier: Apache-2.0
"""Products with few rows have a kernel of their own: its edges, against float64."""

import pytest
import torch
from ascend_sim.counters import counting

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def numbers(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(got, expected, dtype):
    assert got.device.type == "npu"
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=30 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9, 127, 128, 129])
@pytest.mark.parametrize(("depth", "columns"), [(16, 1), (48, 7), (576, 64), (64, 1001), (50, 24)])
def test_linear(dtype, rows, depth, columns):
    x, weight, bias = (numbers(*shape, dtype=dtype) for shape in ((rows, depth), (columns, depth), (columns,)))
    expected = x.double() @ weight.double().t()
    close(torch.nn.functional.linear(x.npu(), weight.npu()), expected, dtype)
    close(torch.nn.functional.linear(x.npu(), weight.npu(), bias.npu()), expected + bias.double(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides(dtype):
    """Slices of wider rows on both sides, and a right side that is no transpose."""
    wide, weights = numbers(5, 96, dtype=dtype).npu(), numbers(20, 80, dtype=dtype).npu()
    x, weight = wide[:, 16:48], weights[3:, 8:40]
    expected = x.cpu().double() @ weight.cpu().double().t()
    close(x @ weight.t(), expected, dtype)
    close(x @ weight.t().contiguous(), expected, dtype)
    close(wide.t()[16:48].t() @ weight.t(), expected, dtype)


def test_addmm_with_factors_and_a_whole_matrix_of_addends():
    x, weight, addend = numbers(3, 32, dtype=torch.float32), numbers(8, 32, dtype=torch.float32), torch.ones(3, 8)
    product = x.double() @ weight.double().t()
    npu = (addend.npu(), x.npu(), weight.npu().t())
    close(torch.addmm(*npu), 1 + product, torch.float32)
    close(torch.addmm(*npu, beta=2, alpha=0.5), 2 + 0.5 * product, torch.float32)
    close(torch.addmm(addend[0].npu(), *npu[1:], beta=0), product, torch.float32)


def test_gradients_and_counts():
    x, weight = numbers(4, 32, dtype=torch.float32), numbers(8, 32, dtype=torch.float32)
    on_npu = [x.npu().requires_grad_(), weight.npu().requires_grad_()]
    with counting() as work:
        torch.nn.functional.linear(*on_npu).square().sum().backward()
    on_cpu = [x.double().requires_grad_(), weight.double().requires_grad_()]
    torch.nn.functional.linear(*on_cpu).square().sum().backward()
    for mine, theirs in zip(on_npu, on_cpu, strict=True):
        close(mine.grad, theirs.grad, torch.float32)
    assert work.delta.flops == 3 * 2 * 4 * 32 * 8


def test_mistakes_are_torch_s_own():
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied|size mismatch"):
        torch.mm(torch.ones(2, 16).npu(), torch.ones(8, 32).npu().t())
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(torch.ones(2, 16).npu(), torch.ones(8, 16).npu().t().bfloat16())
