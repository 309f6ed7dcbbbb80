# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of quantisation and of the int8 product."""

import torch
import torch_npu
from contract_cases import Case, case

BF16, F16, F32, I8, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64


def npu(shape, dtype):
    return torch.ones(shape, dtype=dtype).npu()


def quantize(x=(2, 8), dtype=BF16, scales=(8,), scales_dtype=None, zero=None, zero_dtype=None, axis=-1, div=False):
    factors = npu(scales, scales_dtype or dtype)
    offsets = None if zero is None else npu(zero, zero_dtype or factors.dtype)
    return torch_npu.npu_quantize(npu(x, dtype), factors, offsets, torch.qint8, axis, div)


def dynamic_quant(x=(4, 8), dtype=BF16, smooth=None, smooth_dtype=None, groups=None, groups_dtype=I32):
    smooth = None if smooth is None else npu(smooth, smooth_dtype or dtype)
    groups = None if groups is None else torch.tensor(groups, dtype=groups_dtype).npu()
    return torch_npu.npu_dynamic_quant(npu(x, dtype), smooth_scales=smooth, group_index=groups)


def quant_matmul(
    x1=(2, 16), x2=(16, 4), dtype=I8, scale=(4,), scale_dtype=F32, offset=None, offset_dtype=F32, token=None, token_dtype=F32, bias=None, bias_dtype=I32, out=BF16
):  # fmt: skip
    given = {
        "offset": None if offset is None else npu(offset, offset_dtype),
        "pertoken_scale": None if token is None else npu(token, token_dtype),
        "bias": None if bias is None else npu(bias, bias_dtype),
    }
    return torch_npu.npu_quant_matmul(
        npu(x1, dtype), npu(x2, dtype), npu(scale, scale_dtype), output_dtype=out, **given
    )


CASES = {
    "npu_quantize.dtype": case(lambda: quantize(dtype=I32, scales_dtype=BF16, div=True), lambda: quantize(dtype=F32)),
    "npu_quantize.scales-dtype": case(lambda: quantize(dtype=F32, scales_dtype=I32), lambda: quantize(dtype=F32, scales_dtype=F16)),
    "npu_quantize.divisors-dtype": case(lambda: quantize(scales_dtype=F16, div=True), lambda: quantize(scales_dtype=F32, div=True)),
    "npu_quantize.factors-dtype": case(lambda: quantize(scales_dtype=F32), lambda: quantize(scales_dtype=BF16)),
    "npu_quantize.scales-shape": case(lambda: quantize(scales=(2,)), lambda: quantize(scales=(1,)), lambda: quantize(scales=(1, 8))),
    "npu_quantize.zero-points-dtype": case(
        lambda: quantize(zero=(8,), zero_dtype=F32, div=True), lambda: quantize(zero=(8,), zero_dtype=I32, div=True)
    ),
    "npu_quantize.zero-points-as-scales": Case(
        breaks=[lambda: quantize(zero=(8,), zero_dtype=F32), lambda: quantize(zero=(1,))], edges=[lambda: quantize(zero=(8,))]
    ),
    "npu_quantize.zero-points-shape": case(
        lambda: quantize(zero=(2,), zero_dtype=I32, div=True), lambda: quantize(zero=(1,), zero_dtype=I32, div=True)
    ),
    "npu_quantize.axis": Case(
        breaks=[lambda: quantize(axis=-3), lambda: quantize(axis=2)],
        edges=[lambda: quantize(scales=(2,), axis=-2), lambda: quantize(axis=1)],
    ),
    "npu_dynamic_quant.dtype": Case(
        breaks=[lambda: dynamic_quant(dtype=F32), lambda: dynamic_quant(dtype=I32)], edges=[lambda: dynamic_quant(dtype=F16)]
    ),
    "npu_dynamic_quant.rank": case(lambda: dynamic_quant((8,)), lambda: dynamic_quant((1, 8))),
    "npu_dynamic_quant.smooth-scales-dtype": case(
        lambda: dynamic_quant(smooth=(8,), smooth_dtype=F16), lambda: dynamic_quant(smooth=(8,))
    ),
    "npu_dynamic_quant.smooth-scales-shape": case(
        lambda: dynamic_quant(smooth=(2, 8)), lambda: dynamic_quant(smooth=(2, 8), groups=(1, 4))
    ),
    "npu_dynamic_quant.group-index-dtype": case(
        lambda: dynamic_quant(smooth=(2, 8), groups=(1, 4), groups_dtype=I64), lambda: dynamic_quant(smooth=(2, 8), groups=(1, 4))
    ),
    "npu_dynamic_quant.group-index-shape": case(
        lambda: dynamic_quant(smooth=(2, 8), groups=(1, 2, 4)), lambda: dynamic_quant(smooth=(3, 8), groups=(1, 2, 4))
    ),
    "npu_dynamic_quant.group-index": Case(
        breaks=[lambda: dynamic_quant(smooth=(2, 8), groups=(1, 3)), lambda: dynamic_quant(smooth=(3, 8), groups=(2, 1, 4))],
        edges=[lambda: dynamic_quant(smooth=(3, 8), groups=(1, 2, 4))],
    ),
    "npu_quant_matmul.dtype": case(lambda: quant_matmul(dtype=I32), lambda: quant_matmul(dtype=I8)),
    "npu_quant_matmul.rank": Case(
        breaks=[lambda: quant_matmul((16,)), lambda: quant_matmul((1, 1, 1, 1, 1, 2, 16))],
        edges=[lambda: quant_matmul((1, 16)), lambda: quant_matmul((1, 1, 1, 1, 2, 16))],
    ),
    "npu_quant_matmul.k": case(lambda: quant_matmul((2, 8)), lambda: quant_matmul((2, 16))),
    "npu_quant_matmul.not-empty": case(lambda: quant_matmul((0, 16)), lambda: quant_matmul((1, 16))),
    "npu_quant_matmul.size": Case(
        breaks=[lambda: quant_matmul((1, 65536), (65536, 4)), lambda: quant_matmul((1, 1), (1, 65536), scale=(1,))],
        edges=[lambda: quant_matmul((1, 65535), (65535, 4)), lambda: quant_matmul((1, 1), (1, 65535), scale=(1,))],
    ),
    "npu_quant_matmul.output-dtype": case(lambda: quant_matmul(out=F32), lambda: quant_matmul(out=F16), lambda: quant_matmul(out=I8)),
    "npu_quant_matmul.scale-shape": case(
        lambda: quant_matmul(scale=(2,)), lambda: quant_matmul(scale=(1,)), lambda: quant_matmul(scale=(4,))
    ),
    "npu_quant_matmul.scale-dtype": case(
        lambda: quant_matmul(scale_dtype=BF16, out=F16), lambda: quant_matmul(scale_dtype=BF16, out=BF16)
    ),
    "npu_quant_matmul.offset": case(lambda: quant_matmul(offset=(4,)), lambda: quant_matmul(offset=(4,), out=I8)),
    "npu_quant_matmul.offset-dtype": case(
        lambda: quant_matmul(offset=(4,), offset_dtype=BF16, out=I8), lambda: quant_matmul(offset=(4,), out=I8)
    ),
    "npu_quant_matmul.offset-shape": case(
        lambda: quant_matmul(offset=(2,), out=I8), lambda: quant_matmul(offset=(1,), out=I8)
    ),
    "npu_quant_matmul.pertoken-scale-dtype": case(
        lambda: quant_matmul(token=(2,), token_dtype=BF16), lambda: quant_matmul(token=(2,))
    ),
    "npu_quant_matmul.pertoken-scale-shape": case(lambda: quant_matmul(token=(1,)), lambda: quant_matmul(token=(2,))),
    "npu_quant_matmul.pertoken-output": case(
        lambda: quant_matmul(token=(2,), out=I8), lambda: quant_matmul(token=(2,), out=F16)
    ),
    "npu_quant_matmul.bias-dtype": Case(
        breaks=[
            lambda: quant_matmul(bias=(4,), bias_dtype=F32, out=F16),
            lambda: quant_matmul(bias=(4,), bias_dtype=BF16, token=(2,), out=F16),
            lambda: quant_matmul(bias=(4,), bias_dtype=F16, out=BF16),
        ],
        edges=[
            lambda: quant_matmul(bias=(4,), out=F16),
            lambda: quant_matmul(bias=(4,), bias_dtype=F32, token=(2,), out=F16),
            lambda: quant_matmul(bias=(4,), bias_dtype=F32, out=BF16),
            lambda: quant_matmul(bias=(4,), bias_dtype=BF16, out=BF16),
        ],
    ),
    "npu_quant_matmul.bias-shape": case(lambda: quant_matmul(bias=(2,)), lambda: quant_matmul(bias=(4,))),
}  # fmt: skip
