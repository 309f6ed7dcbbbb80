# SPDX-License-Identifier: Apache-2.0
"""Quantisation and the int8 product against plain integer and float64 arithmetic, and torch_npu's own meta functions."""

import os
import subprocess
import sys

import pytest
import torch
import torch_npu
from sim_bounds import assert_close, bound, gamma

STRICT = torch.ops.ascend_sim.strict()
strict_only = pytest.mark.skipif(not STRICT, reason="ASCEND_SIM_STRICT=0")
DTYPES = [torch.float16, torch.bfloat16] + ([] if STRICT else [torch.float32])
M, K, N = 6, 40, 24


def int8(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def assert_rounded(y, exact, steps, magnitude=None, low=-128, high=127):
    """Integers within a half of float64 numbers that float32 knows within `steps` roundings; saturated."""
    assert_close(y, exact.clamp(low, high), 0.5 + gamma(steps) * (exact.abs() if magnitude is None else magnitude))


def same_as_meta(op, results, *args, **options):
    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    expected = op(*map(meta, args), **{name: meta(value) for name, value in options.items()})
    pairs = zip(results, expected, strict=True) if isinstance(results, tuple) else [(results, expected)]
    for got, wanted in pairs:
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


# npu_quantize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "count"), [((5, 16), -1, 16), ((5, 16), 1, 1), ((2, 3, 8), -2, 3), ((0, 4), -1, 4)]
)
def test_quantize_by_multiplying(dtype, shape, axis, count):
    x = torch.randn(shape, dtype=dtype) * 3
    scales, zeros = (torch.rand(count) * 40 + 1).to(dtype), torch.randint(-50, 50, (count,)).to(dtype)
    args = (x.npu(), scales.npu(), zeros.npu(), torch.qint8, axis, False)
    y = torch_npu.npu_quantize(*args)
    same_as_meta(torch_npu.npu_quantize, y, *args)
    by_row = count > 1 and axis == -2
    s, z = (t.double().view(-1, 1) if by_row else t.double() for t in (scales, zeros))
    assert_rounded(y, x.double() * s + z, 2, (x.double() * s).abs() + z.abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("target", "low", "high"), [(torch.qint8, -128, 127), (torch.quint8, 0, 255)])
def test_quantize_by_dividing_along_any_axis(dtype, target, low, high):
    x = torch.randn(3, 4, 5, dtype=dtype) * 4
    scales, zeros = torch.tensor([0.03, 0.5, 0.07, 1.0]), torch.tensor([3, -2, 0, 9], dtype=torch.int32)
    y = torch_npu.npu_quantize(x.npu(), scales.npu(), zeros.npu(), target, 1, True)
    same_as_meta(torch_npu.npu_quantize, y, x, scales, zeros, target, 1, True)
    quotient = x.double() / scales.double().view(4, 1)
    assert_rounded(y, quotient + zeros.view(4, 1), 2, quotient.abs() + zeros.view(4, 1).abs(), low, high)


def test_quantize_rounds_halves_to_even_and_saturates():
    x = torch.tensor([[0.5, 1.5, -0.5, -2.5, 1e9, -1e9]])
    y = torch_npu.npu_quantize(x.npu(), torch.ones(1).npu(), None, torch.qint8, -1, False)
    assert y.tolist() == [[0, 2, 0, -2, 127, -128]]


def test_quantize_of_a_view():
    x, one = torch.randn(6, 8).npu(), torch.ones(1).npu()
    y = torch_npu.npu_quantize(x.t(), one, None, torch.qint8, -1, False)
    assert torch.equal(y, torch_npu.npu_quantize(x.t().contiguous(), one, None, torch.qint8, -1, False))


# npu_dynamic_quant


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (2, 3, 16), (0, 8)])
def test_dynamic_quant(dtype, shape):
    x = torch.randn(shape, dtype=dtype) * 5
    y, scale = torch_npu.npu_dynamic_quant(x.npu())
    same_as_meta(torch_npu.npu_dynamic_quant, (y, scale), x)
    largest = x.double().abs().amax(-1) / 127
    assert_close(scale, largest, bound(largest, torch.float32, steps=1, stores=0))
    assert_rounded(y, x.double() / scale.cpu().double()[..., None], 1)
    assert x.numel() == 0 or y.abs().amax(-1).min() == 127


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_quant_with_smooth_scales(dtype):
    x, smooth = torch.randn(6, 8, dtype=dtype), torch.rand(3, 8, dtype=dtype) + 0.5
    y, scale = torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=smooth[0].npu())
    factors = smooth[0].double().expand(6, 8)
    for rows in (factors, smooth.double()[[0, 0, 2, 2, 2, 2]]):
        product = x.double() * rows
        largest = product.abs().amax(-1) / 127
        assert_close(scale, largest, bound(largest, torch.float32, steps=2, stores=0))
        assert_rounded(y, product / scale.cpu().double()[:, None], 2)
        ends = torch.tensor([2, 2, 6], dtype=torch.int32).npu()
        y, scale = torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=smooth.npu(), group_index=ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_quant_of_zeros(dtype):
    y, scale = torch_npu.npu_dynamic_quant(torch.zeros(2, 4, dtype=dtype).npu())
    assert not y.any()
    assert not scale.any()


# npu_quant_matmul


def product(x, weight, scale, bias=None, per_token=None, after=None):
    sums = x.long() @ weight.long() + (0 if bias is None else bias.long())
    result = sums.double() * scale.double()
    result = result if per_token is None else result * per_token.double()[:, None]
    return result if after is None else result + after.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(M, K, N), (1, 1, 3), (3, 257, 1), (17, 64, 65)])
def test_quant_matmul(dtype, transposed, shape):
    m, k, n = shape
    x, weight = int8(m, k), int8(n, k, seed=1).t() if transposed else int8(k, n, seed=1)
    scale, bias = torch.rand(n) / 1000, torch.randint(-9999, 9999, (n,), dtype=torch.int32)
    y = torch_npu.npu_quant_matmul(x.npu(), weight.npu(), scale.npu(), bias=bias.npu(), output_dtype=dtype)
    if min(shape) > 1:  # its meta function takes k = 1 for a transposed weight
        same_as_meta(torch_npu.npu_quant_matmul, y, x, weight, scale, bias=bias, output_dtype=dtype)
    expected = product(x, weight, scale, bias)
    assert_close(y, expected, bound(expected, dtype, steps=2))  # the exact sum as float32, the product


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_is", ["none", "int32", "float"])
def test_quant_matmul_by_token(dtype, bias_is):
    x, weight, scale, tokens = int8(M, K), int8(K, N, seed=1), torch.rand(N) / 100, torch.rand(M)
    bias = {"none": None, "int32": torch.arange(N, dtype=torch.int32) * 100, "float": torch.randn(N).to(dtype)}[bias_is]
    on_npu = None if bias is None else bias.npu()
    y = torch_npu.npu_quant_matmul(
        x.npu(), weight.npu(), scale.npu(), pertoken_scale=tokens.npu(), bias=on_npu, output_dtype=dtype
    )
    before, after = (bias, None) if bias_is == "int32" else (None, bias)
    expected = product(x, weight, scale, before, tokens, after)
    magnitude = product(x, weight, scale, before, tokens).abs() + (0 if after is None else after.double().abs())
    assert_close(y, expected, bound(expected, dtype, steps=4, magnitude=magnitude))


def test_quant_matmul_to_int8_and_of_more_dimensions():
    x, weight, scale, offset = int8(2, 3, K), int8(K, N, seed=1), torch.tensor([1e-3]), torch.tensor([5.0])
    y = torch_npu.npu_quant_matmul(x.npu(), weight.npu(), scale.npu(), offset=offset.npu())
    same_as_meta(torch_npu.npu_quant_matmul, y, x, weight, scale, offset=offset)
    scaled = product(x.view(6, K), weight, scale)
    assert_rounded(y.view(6, N), scaled + 5, 3, scaled.abs() + 5)


def test_the_product_is_exact_where_int16_would_overflow():
    x, weight = torch.full((1, 65535), -128, dtype=torch.int8), torch.full((65535, 1), -128, dtype=torch.int8)
    scale = torch.ones(1) / 2**16
    y = torch_npu.npu_quant_matmul(x.npu(), weight.npu(), scale.npu(), output_dtype=torch.bfloat16)
    assert y.item() == torch.tensor(65535 * 2**14 / 2**16).bfloat16().item()


def test_the_product_is_exact_on_older_processors():
    """Without VNNI oneDNN's own int8 product adds pairs in int16, which saturates: 127 * 127 * 2 does not fit."""
    code = (
        "import torch, torch_npu; x = torch.full((17, 64), 127, dtype=torch.int8).npu(); w = torch.full((64, 65), 127, dtype=torch.int8).npu();"
        "y = torch_npu.npu_quant_matmul(x, w, torch.ones(1).npu() / 64, output_dtype=torch.bfloat16);"
        "assert (y.cpu() == torch.tensor(127.0 * 127).bfloat16()).all(), y"
    )
    for name in ("SSE41", "AVX2"):
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": name}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr


def test_flops_are_counted():
    from ascend_sim.counters import counting

    one = torch.ones(N).npu()
    with counting() as work:
        torch_npu.npu_quant_matmul(int8(M, K).npu(), int8(K, N).npu(), one, output_dtype=torch.bfloat16)
    assert work.delta.operators["npu::npu_quant_matmul"].flops == 2 * M * K * N


HALF, ONE = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch_npu.npu_quantize(ONE.npu(), ONE.npu(), None, torch.quint4x2, -1, False), "dtype must be qint8"),
        (
            lambda: torch_npu.npu_quantize(ONE.npu(), torch.ones(3).npu(), None, torch.qint8, -1, False),
            "1 or 1 numbers",
        ),
        (lambda: torch_npu.npu_quantize(ONE.npu(), ONE.npu(), None, torch.qint8, -2, False), "axis -2 does not fit"),
        (lambda: torch_npu.npu_dynamic_quant(HALF.npu(), dst_type=torch.quint4x2), "dst_type must be int8"),
        (lambda: torch_npu.npu_dynamic_quant(HALF[0].npu()), "more than 1 dimension"),
        (lambda: torch_npu.npu_quant_matmul(HALF.npu(), HALF.npu(), ONE.npu()), "must be int8"),
        (lambda: torch_npu.npu_quant_matmul(int8(2, 3).npu(), int8(4, 3).npu(), ONE.npu()), "does not fit"),
        (lambda: torch_npu.npu_quant_matmul(int8(2, 3).npu(), int8(3, 4).npu(), torch.ones(3).npu()), "scale must be"),
    ],
)
def test_rejections(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@strict_only
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch_npu.npu_quantize(HALF.npu(), ONE.npu(), None, torch.qint8, -1, False), "data type of input"),
        (
            lambda: torch_npu.npu_quantize(ONE.npu(), ONE.npu(), ONE.int().npu(), torch.qint8, -1, False),
            "data type and shape of scales",
        ),
        (lambda: torch_npu.npu_dynamic_quant(HALF.float().npu()), "x must be float16 or bfloat16"),
        (
            lambda: torch_npu.npu_quant_matmul(
                int8(2, 3).npu(), int8(3, 4).npu(), ONE.bfloat16().npu(), output_dtype=torch.float16
            ),
            "bfloat16 scale is for bfloat16 output",
        ),
        (
            lambda: torch_npu.npu_quant_matmul(
                int8(2, 3).npu(), int8(3, 4).npu(), ONE.npu(), bias=torch.ones(4).npu(), output_dtype=torch.float16
            ),
            "a bias of Float does not go with Half output without pertoken_scale",
        ),
        (lambda: torch_npu.npu_quant_matmul(int8(0, 3).npu(), int8(3, 4).npu(), ONE.npu()), "must not be empty"),
    ],
)
def test_strict_rejections(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
