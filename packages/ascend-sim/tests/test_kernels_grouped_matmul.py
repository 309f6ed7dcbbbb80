# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix products and what follows them in int8: against float64 mathematics group by group, and torch_npu's own meta functions."""

import pytest
import torch
import torch_npu
from ascend_sim import counters
from sim_bounds import FUNCTION, assert_close, assert_quantised, bound, dot_bound, gamma
from sim_memory import is_unwritten

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
strict_only = pytest.mark.skipif(not torch.ops.ascend_sim.strict(), reason="ASCEND_SIM_STRICT=0")
relaxed_only = pytest.mark.skipif(torch.ops.ascend_sim.strict(), reason="float32 needs ASCEND_SIM_STRICT=0")
grouped_matmul = torch_npu.npu_grouped_matmul
COUNTS = {  # rows of each expert, rows after the last
    "even": ([2, 2, 2], 0),
    "empty experts": ([0, 9, 0, 1, 0], 0),
    "all to one": ([0, 0, 30], 0),
    "padded": ([3, 0, 5], 4),
    "no rows": ([0, 0], 0),
    "only padding": ([0, 0], 3),
}


def on(device, value):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [on(device, item) for item in value] if isinstance(value, list) else value


def run(kernel, *args, **kwargs):
    """The results on the CPU, once their shapes and types are those of the meta function."""
    results, expected = (
        kernel(*on(device, list(args)), **{name: on(device, value) for name, value in kwargs.items()})
        for device in ("npu", "meta")
    )
    results, expected = (list(r) if isinstance(r, list | tuple) else [r] for r in (results, expected))
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]
    return [r.cpu() for r in results]


def groups(counts):
    """The rows of each expert."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def lists(counts):
    """The same groups as counts and as cumulative counts."""
    return {"group_list": torch.tensor(counts), "group_list_type": 1}, {"group_list": torch.tensor(counts).cumsum(0)}


def numbers(*shape, dtype):
    return (torch.randn(shape) / shape[-2] ** 0.25 if len(shape) > 1 else torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_floating(dtype, single, biased, name):
    counts, padding = COUNTS[name]
    k, n, experts = 37, 530, len(counts)
    x, weight = numbers(sum(counts) + padding, k, dtype=dtype), numbers(experts, k, n, dtype=dtype)
    bias = numbers(experts, n, dtype=torch.float16 if dtype == torch.float16 else torch.float32) if biased else None
    expected, allowed = torch.zeros(len(x), n, dtype=torch.double), torch.zeros(len(x), n, dtype=torch.double)
    for e, rows in enumerate(groups(counts)):
        product, added = x[rows].double() @ weight[e].double(), torch.zeros(()) if bias is None else bias[e].double()
        expected[rows] = product + added
        allowed[rows] = dot_bound(x[rows], weight[e], product, dtype, more=1, added=added)
        if biased:  # the product is stored before the bias is added
            allowed[rows] += bound(expected[rows], dtype, steps=0)
    options = {"split_item": 2, "group_type": 0}
    if bias is not None:
        options["bias"] = [bias] if single else list(bias)
    for group_list in lists(counts):
        (out,) = run(grouped_matmul, [x], [weight] if single else list(weight), **options, **group_list)
        assert_close(out[: sum(counts)], expected[: sum(counts)], allowed[: sum(counts)])
        assert is_unwritten(out[sum(counts) :])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 70])
def test_transposed_weights(dtype, rows):
    """Weights as checkpoints have them, [experts, n, k], seen as [experts, k, n]."""
    x, weight = numbers(2 * rows, 64, dtype=dtype), numbers(2, 48, 64, dtype=dtype)
    (out,) = grouped_matmul(
        [x.npu()], [weight.npu().transpose(1, 2)], split_item=3, group_type=0, group_list=torch.tensor([rows, 2 * rows]).npu()
    )  # fmt: skip
    x, weight = x.view(2, rows, 64), weight.transpose(1, 2)
    expected = x.double() @ weight.double()
    assert_close(out.view(2, rows, 48), expected, dot_bound(x, weight, expected, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_x(dtype):
    weight = [numbers(16, 24, dtype=dtype) for _ in range(3)]
    x = [numbers(rows, 16, dtype=dtype) for rows in (4, 0, 1)]
    expected = [a.double() @ b.double() for a, b in zip(x, weight, strict=True)]
    allowed = [dot_bound(a, b, product, dtype) for a, b, product in zip(x, weight, expected, strict=True)]
    (out,) = run(grouped_matmul, x, weight, split_item=2, group_type=0)
    assert_close(out, torch.cat(expected), torch.cat(allowed))
    x[0] = x[0].view(2, 2, 16)
    outs = run(grouped_matmul, x, weight, split_item=0, group_type=-1)
    for out, right, most in zip(outs, expected, allowed, strict=True):
        assert_close(out, right.view(out.shape), most.view(out.shape))


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("biased", [False, True])
def test_int8_to_int32_is_exact(name, biased):
    counts, padding = COUNTS[name]
    x, weight = int8(sum(counts) + padding, 2051), int8(len(counts), 2051, 19)  # sums beyond float32's integers
    bias = torch.randint(-1000, 1000, (len(counts), 19), dtype=torch.int32) if biased else None
    expected = torch.zeros(len(x), 19, dtype=torch.long)
    for e, rows in enumerate(groups(counts)):
        expected[rows] = x[rows].long() @ weight[e].long() + (0 if bias is None else bias[e].long())
    for group_list in lists(counts):
        options = {"split_item": 2, "group_type": 0, "output_dtype": torch.int32, **group_list}
        (out,) = run(grouped_matmul, [x], [weight], bias=None if bias is None else [bias], **options)
        assert torch.equal(out[: sum(counts)].long(), expected[: sum(counts)])
        assert is_unwritten(out[sum(counts) :])
    swapped = weight.transpose(1, 2).contiguous().npu().transpose(1, 2)
    (out,) = grouped_matmul(on("npu", [x]), [swapped], **on_npu(options))
    assert biased or torch.equal(out.cpu().long()[: sum(counts)], expected[: sum(counts)])


def on_npu(options):
    return {name: on("npu", value) for name, value in options.items()}


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        pytest.param(torch.float32, torch.float32, marks=relaxed_only),
    ],
    ids=str,
)
@pytest.mark.parametrize("by_token", [True, False])
def test_int8_with_scales(dtype, scale_dtype, by_token):
    counts = [3, 0, 1, 12]
    x, weight = int8(16, 40), int8(4, 40, 24)
    scale, token_scale = (torch.rand(4, 24) * 1e-3).to(scale_dtype), torch.rand(16)
    expected = torch.zeros(16, 24, dtype=torch.double)
    for e, rows in enumerate(groups(counts)):
        expected[rows] = x[rows].double() @ weight[e].double() * scale[e].double()
    options = {"scale": [scale], "split_item": 2, "group_type": 0, "output_dtype": dtype}
    if by_token:
        expected *= token_scale.double()[:, None]
        options["per_token_scale"] = [token_scale]
    allowed = bound(expected, dtype, steps=3)  # the exact sum as float32, two products
    (out,) = run(grouped_matmul, [x], [weight], **options, **lists(counts)[0])
    assert_close(out, expected, allowed)
    (out,) = run(grouped_matmul, [x], list(weight), **{**options, "scale": list(scale)}, **lists(counts)[1])
    assert_close(out, expected, allowed)


def swiglu(x, left=True, roundings=0):
    """SwiGLU in float64, and the error of float32 where x was rounded so many times: exp, 1 +, 1 /, two products, and what silu and the product do to x's error."""
    gate, value = x.chunk(2, 1) if left else reversed(x.chunk(2, 1))
    result = torch.nn.functional.silu(gate) * value
    return result, result.abs() * gamma(FUNCTION + 4 + roundings * (2 + gate.abs()))


def fused(x, weight, *more):
    """The operator, whose weight must be in FRACTAL_NZ; a tensor without memory has no format."""
    weight = weight if weight.is_meta else torch_npu.npu_format_cast(weight, 29)
    return torch_npu.npu_grouped_matmul_swiglu_quant(x, weight, *more)


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "no rows"])
def test_grouped_matmul_swiglu_quant(name):
    counts, padding = COUNTS[name]
    x, weight = int8(sum(counts) + padding, 64), int8(len(counts), 64, 32)
    weight_scale, x_scale = torch.rand(len(counts), 32) * 1e-3, torch.rand(len(x)) * 0.1
    y, scale, _ = run(fused, x, weight, torch.tensor(counts).cumsum(0), weight_scale, x_scale)
    expected, error = torch.zeros(2, len(x), 16, dtype=torch.double)
    for e, rows in enumerate(groups(counts)):
        dense = x[rows].double() @ weight[e].double() * weight_scale[e].double() * x_scale[rows, None].double()
        expected[rows], error[rows] = swiglu(dense, roundings=3)
    used = sum(counts)
    assert_quantised(y[:used], scale[:used], expected[:used], error[:used])
    assert is_unwritten(y[used:])
    assert is_unwritten(scale[used:])


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("smooth", [True, False])
def test_dequant_swiglu_quant(left, smooth):
    counts, half = [4, 0, 3], 64
    x = torch.randint(-9999, 9999, (9, 2 * half), dtype=torch.int32)
    weight_scale, token_scale, quant_scale = torch.rand(3, 2 * half) * 1e-3, torch.rand(9), torch.rand(3, half) + 0.5
    y, scale = run(
        torch_npu.npu_dequant_swiglu_quant, x, weight_scale=weight_scale, activation_scale=token_scale, quant_mode=1,
        quant_scale=quant_scale if smooth else None, group_index=torch.tensor(counts), activate_left=left,
    )  # fmt: skip
    expected, error = torch.zeros(2, 9, half, dtype=torch.double)
    for e, rows in enumerate(groups(counts)):
        dense = x[rows].double() * weight_scale[e].double() * token_scale[rows, None].double()
        factor = quant_scale[e].double() if smooth else 1
        expected[rows], error[rows] = (part * factor for part in swiglu(dense, left, roundings=4))
    assert_quantised(y[:7], scale[:7], expected[:7], error[:7])
    assert is_unwritten(y[7:])
    assert is_unwritten(scale[7:])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, pytest.param(torch.float32, marks=relaxed_only)], ids=str
)
@pytest.mark.parametrize("variant", [False, True])
def test_swiglu_quant_of_floats(dtype, variant):
    x = (torch.randn(5, 20) * 6).to(dtype)
    y, scale = run(torch_npu.npu_dequant_swiglu_quant, x, quant_mode=1, activate_left=True, swiglu_mode=int(variant))
    expected, error = swiglu(x.double())
    if variant:
        gate, value = x.double()[:, ::2].clamp(max=7), x.double()[:, 1::2].clamp(-7, 7)
        weighted = gate * torch.sigmoid(1.702 * gate)
        expected = weighted * (value + 1)
        error = weighted.abs() * (value.abs() + 1) * gamma(FUNCTION + 5 + 2 * (1.702 * gate).abs())
    assert_quantised(y, scale, expected, error)


def test_dequant_with_a_bias():
    x, bias = torch.randint(-99, 99, (3, 8), dtype=torch.int32), torch.randint(-99, 99, (8,), dtype=torch.int32)
    weight_scale, token_scale = torch.rand(1, 8), torch.rand(3, 1)
    y, scale = run(
        torch_npu.npu_dequant_swiglu_quant, x, weight_scale=weight_scale, activation_scale=token_scale, bias=bias,
        quant_mode=1, activate_left=True,
    )  # fmt: skip
    dense = (x + bias).double() * weight_scale.double() * token_scale.double()
    assert_quantised(y, scale, *swiglu(dense, roundings=3))


def test_only_rows_of_experts_are_counted():
    x, weight, ends = torch.zeros(20, 8).npu(), torch.zeros(3, 8, 5).npu(), torch.tensor([2, 2, 9]).npu()
    with counters.counting() as work:
        grouped_matmul([x], [weight], split_item=2, group_type=0, group_list=ends)
    assert work.delta.operators == {"npu::npu_grouped_matmul": counters.OperatorCount(1, 2 * 9 * 8 * 5)}
    with counters.counting() as work:
        fused(
            x.to(torch.int8), torch.zeros(3, 8, 4, dtype=torch.int8).npu(), ends, torch.zeros(3, 4).npu(),
            torch.zeros(20).npu(),
        )  # fmt: skip
    assert work.delta.operators["npu::npu_grouped_matmul_swiglu_quant"].flops == 2 * 9 * 8 * 4


def call(x=None, weight=None, **changes):
    x = torch.zeros(4, 8, dtype=torch.bfloat16) if x is None else x
    weight = torch.zeros(2, 8, 6, dtype=x.dtype) if weight is None else weight
    options = {"split_item": 2, "group_type": 0, "group_list_type": 1, "group_list": torch.tensor([1, 3])} | changes
    return grouped_matmul([x.npu()], [weight.npu()], **on_npu(options))


X8 = torch.zeros(4, 8, dtype=torch.int8)
REJECTIONS = {
    "group_type must be 0 or -1, got None": {"group_type": None},
    "split_item must be 2 or 3 with group_type 0, got 0": {"split_item": 0},
    r"group_list \(counts\) must name rising rows, at most 4, got 4 at \[1\]": {"group_list": torch.tensor([1, 4])},
    r"group_list \(cumulative counts\) must name rising rows": {
        "group_list": torch.tensor([3, 1]),
        "group_list_type": 0,
    },
    "a number for each of the 2 weights, got 3": {"group_list": torch.tensor([1, 3, 0])},
    "group_list must be int64": {"group_list": torch.tensor([1, 3], dtype=torch.int32)},
    "act_type is not simulated, got 5": {"act_type": 5},
    "must have one k": {"weight": torch.zeros(2, 9, 6, dtype=torch.bfloat16)},
    "weight must have the data type of x": {"weight": torch.zeros(2, 8, 6)},
    "output_dtype must be the data type of x": {"output_dtype": torch.float16},
    "scale is needed for output_dtype BFloat16": {"x": X8, "output_dtype": torch.bfloat16},
    "scale must be None for output_dtype int32": {"x": X8, "output_dtype": torch.int32, "scale": [torch.zeros(2, 6)]},
    "output_dtype must be int32, float16 or bfloat16": {"x": X8},
    "bias must be a list as long as weight, 1, got 2": {"bias": [torch.zeros(6)] * 2},
    "bias must be one tensor .experts, n.": {"bias": [torch.zeros(6)]},
}


@pytest.mark.parametrize(("message", "changes"), REJECTIONS.items(), ids=REJECTIONS)
def test_rejections(message, changes):
    call()
    with pytest.raises(RuntimeError, match=f"npu_grouped_matmul: .*{message}"):
        call(**changes)


@strict_only
def test_strict_rejections():
    with pytest.raises(RuntimeError, match=r"bias must be Float with x of BFloat16, got BFloat16"):
        call(bias=[torch.zeros(2, 6, dtype=torch.bfloat16)])
    with pytest.raises(RuntimeError, match=r"scale and output_dtype must be bfloat16 and bfloat16 or"):
        call(x=X8, scale=[torch.zeros(2, 6)], output_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"H must be a multiple of 64"):
        torch_npu.npu_dequant_swiglu_quant(
            torch.zeros(4, 8).bfloat16().npu(), quant_mode=1, group_index=torch.tensor([4]).npu()
        )
    with pytest.raises(RuntimeError, match="activation_scale is required with x of int32"):
        torch_npu.npu_dequant_swiglu_quant(
            torch.zeros(4, 8, dtype=torch.int32).npu(), weight_scale=torch.zeros(8).npu(), quant_mode=1
        )
