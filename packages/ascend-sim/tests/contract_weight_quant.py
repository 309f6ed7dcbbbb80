# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of products with a weight of int8 or int4, and of the packing of int4."""

import torch
import torch_npu
from contract_cases import Case, case

BF16, F16, F32, I8, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32
ND, FRACTAL_NZ = 2, 29


def npu(shape, dtype=BF16):
    return torch.ones(shape, dtype=dtype).npu()


def tensor(given, dtype):
    """A tensor of that shape; what is none is given as it is."""
    return npu(given, dtype) if isinstance(given, tuple) else given


def product(
    x=(2, 64), weight=(64, 16), scale=(16,), offset=None, bias=None, *, dtype=BF16, weight_dtype=I8, scale_dtype=None, offset_dtype=None, bias_dtype=None, **options
):  # fmt: skip
    return torch_npu.npu_weight_quant_batchmatmul(
        tensor(x, dtype),
        tensor(weight, weight_dtype),
        tensor(scale, scale_dtype or dtype),
        tensor(offset, offset_dtype or scale_dtype or dtype),
        bias=tensor(bias, bias_dtype or (F16 if dtype == F16 else F32)),
        **options,
    )


def grouped(size, k=64, scale=(2, 16), **options):
    return product((2, k), (k, 16), scale, antiquant_group_size=size, **options)


def in_format(number):
    return torch_npu.npu_format_cast(npu((64, 16), I8), number)


def pack(shape=(4, 16), dtype=I32, value=1):
    return torch_npu.npu_convert_weight_to_int4pack(torch.full(shape, value, dtype=dtype).npu())


CASES = {
    "npu_weight_quant_batchmatmul.dtype": Case(
        breaks=[lambda: product(dtype=F32), lambda: product(dtype=I32, scale_dtype=BF16)], edges=[lambda: product(dtype=F16)]
    ),
    "npu_weight_quant_batchmatmul.rank": Case(
        breaks=[lambda: product(x=(1, 2, 64)), lambda: product(weight=(1, 64, 16))], edges=[lambda: product()]
    ),
    "npu_weight_quant_batchmatmul.layout": Case(
        breaks=[
            lambda: product(x=npu((2, 128))[:, :64]),
            lambda: product(weight=npu((64, 32), I8)[:, :16]),
            lambda: grouped(32, scale=npu((2, 32))[:, :16]),
            lambda: grouped(32, offset=npu((2, 32))[:, :16]),
        ],
        edges=[
            lambda: product(x=npu((64, 2)).t()),
            lambda: product(weight=npu((16, 64), I8).t()),
            lambda: grouped(32, scale=npu((16, 2)).t(), offset=npu((16, 2)).t()),
        ],
    ),
    "npu_weight_quant_batchmatmul.weight-dtype": case(
        lambda: product(weight_dtype=BF16), lambda: product(), lambda: product(weight=(64, 2), weight_dtype=I32)
    ),
    "npu_weight_quant_batchmatmul.weight-format": case(
        lambda: product(weight=in_format(FRACTAL_NZ)), lambda: product(weight=in_format(ND))
    ),
    "npu_weight_quant_batchmatmul.k": Case(
        breaks=[
            lambda: product(weight=(32, 16)),
            lambda: product(x=(2, 8), weight=npu((16, 1), I32).t()),
        ],
        edges=[
            lambda: product(x=(2, 16), weight=npu((16, 2), I32).t()),
            lambda: product(x=(2, 1), weight=npu((2, 1), I32).t()),
        ],
    ),
    "npu_weight_quant_batchmatmul.not-empty": Case(
        breaks=[lambda: product(x=(0, 64)), lambda: product(weight=(64, 0))], edges=[lambda: product(x=(1, 64))]
    ),
    "npu_weight_quant_batchmatmul.size": Case(
        breaks=[lambda: product((1, 65536), (65536, 4), (1,)), lambda: product((1, 1), (1, 65536), (1,))],
        edges=[lambda: product((1, 65535), (65535, 4), (1,)), lambda: product((1, 1), (1, 65535), (1,))],
    ),
    "npu_weight_quant_batchmatmul.transposed-rows": case(
        lambda: product(npu((2, 65536)).t(), (2, 1), (1,)),
        lambda: product(npu((2, 65535)).t(), (2, 1), (1,)),
        lambda: product((65536, 2), (2, 1), (1,)),
    ),
    "npu_weight_quant_batchmatmul.scale-shape": Case(
        breaks=[lambda: product(scale=(2,)), lambda: product(scale=(1, 1, 16)), lambda: grouped(32, scale=(3, 16)), lambda: grouped(32, scale=(2, 1))],
        edges=[
            *(lambda shape=shape: product(scale=shape) for shape in [(1,), (1, 1), (16,), (1, 16)]),
            lambda: grouped(32),
            lambda: grouped(32, 65, (3, 16)),
        ],
    ),
    "npu_weight_quant_batchmatmul.scale-dtype": case(
        lambda: product(scale_dtype=F16), lambda: product(scale_dtype=BF16), lambda: product(dtype=F16, scale_dtype=F16)
    ),
    "npu_weight_quant_batchmatmul.offset-shape": case(
        lambda: product(offset=(1, 16)), lambda: product(offset=(16,)), lambda: grouped(32, offset=(2, 16))
    ),
    "npu_weight_quant_batchmatmul.offset-dtype": Case(
        breaks=[lambda: product(offset=(16,), offset_dtype=F16), lambda: product(offset=(16,), offset_dtype=I32)],
        edges=[lambda: product(offset=(16,))],
    ),
    "npu_weight_quant_batchmatmul.bias-shape": Case(
        breaks=[lambda: product(bias=(2,)), lambda: product(bias=(16, 1))],
        edges=[lambda: product(bias=(16,)), lambda: product(bias=(1, 16)), lambda: product(bias=(1,))],
    ),
    "npu_weight_quant_batchmatmul.bias-dtype": Case(
        breaks=[lambda: product(bias=(16,), bias_dtype=BF16), lambda: product(bias=(16,), dtype=F16, bias_dtype=F32)],
        edges=[lambda: product(bias=(16,), bias_dtype=F32), lambda: product(bias=(16,), dtype=F16, bias_dtype=F16)],
    ),
    "npu_weight_quant_batchmatmul.bias-layout": case(
        lambda: product(bias=npu((32,), F32)[::2]), lambda: product(bias=npu((32,), F32)[:16])
    ),
    "npu_weight_quant_batchmatmul.group-size": Case(
        breaks=[lambda: grouped(0), lambda: grouped(16, scale=(4, 16)), lambda: grouped(48, 96), lambda: grouped(64)],
        edges=[lambda: grouped(32), lambda: grouped(64, 65), lambda: product(antiquant_group_size=48)],
    ),
    "npu_weight_quant_batchmatmul.inner-precise": Case(
        breaks=[lambda: product(inner_precise=2), lambda: product(inner_precise=-1)], edges=[lambda: product(inner_precise=1)]
    ),
    "npu_convert_weight_to_int4pack.dtype": case(lambda: pack(dtype=I8), lambda: pack()),
    "npu_convert_weight_to_int4pack.rank": Case(breaks=[lambda: pack((16,)), lambda: pack((1, 4, 16))], edges=[lambda: pack()]),
    "npu_convert_weight_to_int4pack.aligned": case(lambda: pack((8, 12)), lambda: pack((12, 8))),
    "npu_convert_weight_to_int4pack.layout": case(
        lambda: torch_npu.npu_convert_weight_to_int4pack(npu((8, 16), I32).t()),
        lambda: torch_npu.npu_convert_weight_to_int4pack(npu((8, 16), I32)),
    ),
    "npu_convert_weight_to_int4pack.values": Case(
        breaks=[lambda: pack(value=8), lambda: pack(value=-9)], edges=[lambda: pack(value=7), lambda: pack(value=-8)]
    ),
}  # fmt: skip
