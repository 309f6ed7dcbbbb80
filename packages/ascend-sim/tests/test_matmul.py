# SPDX-License-Identifier: Apache-2.0
"""Products with few rows have a kernel of their own: its edges, against float64."""

import pytest
import torch
from ascend_sim.counters import counting
from sim_bounds import assert_close, bound, dot_bound

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(got, x, weight, dtype, bias=None):
    """`got` is x [m, k] @ weight [k, n] + bias. Another library than the kernel of few rows may store the product before it adds the bias."""
    assert got.device.type == "npu"
    assert got.dtype == dtype
    product, added = x.double() @ weight.double(), torch.zeros(()) if bias is None else bias.double()
    allowed = dot_bound(x, weight, product, dtype, more=1, added=added)
    assert_close(got, product + added, allowed if bias is None else allowed + bound(product + added, dtype, steps=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 127, 128, 129])
@pytest.mark.parametrize(("depth", "columns"), [(16, 1), (48, 7), (576, 64), (64, 1001), (50, 24)])
def test_linear(dtype, rows, depth, columns):
    x, weight, bias = (numbers(*shape, dtype=dtype) for shape in ((rows, depth), (columns, depth), (columns,)))
    close(torch.nn.functional.linear(x.npu(), weight.npu()), x, weight.t(), dtype)
    close(torch.nn.functional.linear(x.npu(), weight.npu(), bias.npu()), x, weight.t(), dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    """Slices of wider rows on both sides, and a right side that is no transpose."""
    wide, weights = numbers(5, 96, dtype=dtype).npu(), numbers(20, 80, dtype=dtype).npu()
    x, weight = wide[:, 16:48], weights[3:, 8:40]
    plain = x.cpu(), weight.cpu().t()
    close(x @ weight.t(), *plain, dtype)
    close(x @ weight.t().contiguous(), *plain, dtype)
    close(wide.t()[16:48].t() @ weight.t(), *plain, dtype)


def test_addmm_with_factors_and_a_whole_matrix_of_addends():
    x, weight, addend = numbers(3, 32, dtype=torch.float32), numbers(8, 32, dtype=torch.float32), torch.ones(3, 8)
    npu = (addend.npu(), x.npu(), weight.npu().t())
    close(torch.addmm(*npu), x, weight.t(), torch.float32, addend)
    close(torch.addmm(*npu, beta=2, alpha=0.5), x / 2, weight.t(), torch.float32, 2 * addend)
    close(torch.addmm(addend[0].npu(), *npu[1:], beta=0), x, weight.t(), torch.float32)


def test_gradients_and_counts():
    x, weight = numbers(4, 32, dtype=torch.float32), numbers(8, 32, dtype=torch.float32)
    on_npu = [x.npu().requires_grad_(), weight.npu().requires_grad_()]
    with counting() as work:
        torch.nn.functional.linear(*on_npu).square().sum().backward()
    on_cpu = [x.double().requires_grad_(), weight.double().requires_grad_()]
    torch.nn.functional.linear(*on_cpu).square().sum().backward()
    # Twice the outputs, sums of 32 products, times the other operand, summed over 8 columns or 4 rows.
    outputs = 2 * (x.double().abs() @ weight.double().abs().t())
    magnitudes = outputs @ weight.double().abs(), outputs.t() @ x.double().abs()
    for mine, theirs, magnitude in zip(on_npu, on_cpu, magnitudes, strict=True):
        assert_close(mine.grad, theirs.grad, bound(theirs.grad, torch.float32, steps=32 + 8 + 1, magnitude=magnitude))
    assert work.delta.flops == 3 * 2 * 4 * 32 * 8


def test_mistakes_are_torch_s_own():
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied|size mismatch"):
        torch.mm(torch.ones(2, 16).npu(), torch.ones(8, 32).npu().t())
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(torch.ones(2, 16).npu(), torch.ones(8, 16).npu().t().bfloat16())
