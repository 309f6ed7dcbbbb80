# SPDX-License-Identifier: Apache-2.0
"""Products with a weight of int8 or int4 against float64 arithmetic."""

import pytest
import torch
import torch_npu
from sim_bounds import assert_close, dot_bound

STRICT = torch.ops.ascend_sim.strict()
DTYPES = [torch.float16, torch.bfloat16] + ([] if STRICT else [torch.float32])
K, N, GROUP = 104, 520, 32  # the last group has 8 rows
GRANULARITIES = {"tensor": (1,), "channel": (1, N), "group": (-(-K // GROUP), N)}


def numbers(bits, k=K, n=N):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (k, n), dtype=torch.int32, generator=generator)


def on_npu(values, bits, transposed):
    """The weight as the operator takes it."""
    lines = (values.t().contiguous() if transposed else values).npu()
    lines = torch_npu.npu_convert_weight_to_int4pack(lines) if bits == 4 else lines.to(torch.int8)
    return lines.t() if transposed else lines


def rows_of(parameter, k=K):
    """A scale or an offset for each row of the weight, float64."""
    return parameter.double().repeat_interleave(GROUP, 0)[:k] if len(parameter) > 1 else parameter.double()


def parameters(granularity, dtype):
    """Scales and offsets; those of one number as [1]."""
    shape = GRANULARITIES[granularity]
    return (torch.rand(shape) / 8 + 0.01).to(dtype), (torch.randn(shape) * 3).to(dtype)


def bias_of(dtype):
    return torch.randn(N).to(torch.float16 if dtype == torch.float16 else torch.float32)


def group_size(granularity):
    return GROUP if granularity == "group" else 0


def assert_product(y, x, weight, bias=None):
    """Two roundings of each dequantised number, one for the bias."""
    added = 0.0 if bias is None else bias.double()
    expected = x.double() @ weight + added
    assert y.dtype == x.dtype
    assert_close(y, expected, dot_bound(x, weight, expected, x.dtype, more=3, added=added))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_weight_quant_batchmatmul(rows, bits, transposed, granularity, dtype):
    values, x = numbers(bits), torch.randn(rows, K).to(dtype)
    (scale, offset), bias = parameters(granularity, dtype), bias_of(dtype)
    weight = on_npu(values, bits, transposed)
    for given in (None, offset):
        exact = (values.double() + (0 if given is None else rows_of(given))) * rows_of(scale)
        for added in (None, bias):
            y = torch_npu.npu_weight_quant_batchmatmul(
                x.npu(), weight, scale.npu(), None if given is None else given.npu(),
                bias=None if added is None else added.npu(), antiquant_group_size=group_size(granularity),
            )  # fmt: skip
            assert_product(y, x, exact, added)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_shape_is_that_of_the_meta_function(bits, transposed, granularity):
    x, (scale, offset) = torch.randn(3, K).bfloat16(), parameters(granularity, torch.bfloat16)
    operands = [x.npu(), on_npu(numbers(bits), bits, transposed), scale.npu(), offset.npu()]
    options = {"antiquant_group_size": group_size(granularity)}
    y = torch_npu.npu_weight_quant_batchmatmul(*operands, **options)
    expected = torch_npu.npu_weight_quant_batchmatmul(*(t.to("meta") for t in operands), **options)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("rows", [1, 20, 200])
def test_views_that_are_transposed(rows):
    """x, and the scales and offsets of groups, as the transposes of contiguous tensors; k is a multiple of a vector register's length."""
    k = 128
    values, x = numbers(4, k), torch.randn(k, rows).bfloat16().t()
    scale, offset = (torch.rand(N, 4).bfloat16().t() for _ in range(2))
    y = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), on_npu(values, 4, True), scale.npu(), offset.npu(), antiquant_group_size=GROUP
    )
    assert_product(y, x, (values.double() + rows_of(offset, k)) * rows_of(scale, k))


@pytest.mark.parametrize("wrong", ["next group", "no offset", "other order", "no bias"])
def test_the_bound_catches_a_wrong_product(wrong):
    values, x = numbers(4), torch.randn(3, K).bfloat16()
    (scale, offset), bias = parameters("group", torch.bfloat16), bias_of(torch.bfloat16)
    y = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), on_npu(values, 4, True), scale.npu(), offset.npu(), bias=bias.npu(), antiquant_group_size=GROUP
    )
    if wrong == "next group":
        scale = scale.roll(1, 0)
    elif wrong == "no offset":
        offset = offset * 0
    elif wrong == "other order":
        values = values.view(K // 8, 8, N).flip(1).reshape(K, N)
    else:
        bias = bias * 0
    with pytest.raises(AssertionError, match="beyond their bound"):
        assert_product(y, x, (values.double() + rows_of(offset)) * rows_of(scale), bias)


def test_every_value_of_int4_is_kept():
    values = torch.arange(-8, 8, dtype=torch.int32).repeat(16, 1)
    values = torch.stack([row.roll(i) for i, row in enumerate(values)])  # each value at each place of a word
    packed = torch_npu.npu_convert_weight_to_int4pack(values.npu())
    assert (packed.shape, packed.dtype) == ((16, 2), torch.int32)
    one = torch.ones(1).half().npu()
    for weight, expected in ((packed, values), (packed.t(), values.t())):
        y = torch_npu.npu_weight_quant_batchmatmul(torch.eye(16).half().npu(), weight, one)
        assert torch.equal(y.cpu().int(), expected)


def test_flops_are_counted():
    from ascend_sim.counters import counting

    x, weight, one = torch.ones(3, K).half().npu(), on_npu(numbers(4), 4, False), torch.ones(1).half().npu()
    with counting() as work:
        torch_npu.npu_weight_quant_batchmatmul(x, weight, one)
    assert work.delta.operators["npu::npu_weight_quant_batchmatmul"].flops == 2 * 3 * K * N


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"antiquant_scale": torch.ones(N, dtype=torch.int64)}, "antiquant_scale of int64 is not simulated"),
        ({"quant_scale": torch.ones(N)}, "quant_scale, quant_offset and weight_dtype are not simulated"),
        ({"quant_offset": torch.ones(N)}, "quant_scale, quant_offset and weight_dtype are not simulated"),
        ({"weight_dtype": 1}, "quant_scale, quant_offset and weight_dtype are not simulated"),
    ],
)
def test_what_is_not_simulated_is_refused(options, message):
    given = {"antiquant_scale": torch.ones(N).half()} | options
    given = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_weight_quant_batchmatmul(torch.ones(3, K).half().npu(), on_npu(numbers(8), 8, False), **given)
