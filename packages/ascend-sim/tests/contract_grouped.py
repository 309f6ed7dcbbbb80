# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of the products of experts and of what lies between them."""

import torch
import torch_npu
from contract_cases import Case, case

BF16, F16, F32, I8, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64


def npu(shape, dtype=BF16):
    return torch.ones(shape, dtype=dtype).npu()


def numbers(values, dtype=I64):
    return None if values is None else torch.tensor(values, dtype=dtype).npu()


def grouped(
    x=(4, 8),
    weight=(2, 8, 16),
    dtype=BF16,
    weight_dtype=None,
    groups=(1, 3),
    groups_dtype=I64,
    kind=1,
    split_item=2,
    group_type=0,
    out=None,
    **lists,
):
    """x and weight: one shape, or a list of shapes."""  # fmt: skip
    shapes, weights = (list(one) if isinstance(one, list) else [one] for one in (x, weight))
    return torch_npu.npu_grouped_matmul(
        x=[npu(shape, dtype) for shape in shapes],
        weight=[npu(shape, weight_dtype or dtype) for shape in weights],
        group_list=numbers(groups, groups_dtype),
        split_item=split_item,
        group_type=group_type,
        group_list_type=kind,
        output_dtype=out,
        **{name: [npu(shape, kind) for shape, kind in value] for name, value in lists.items()},
    )


def int8(out=BF16, scale_dtype=BF16, **options):
    return grouped(dtype=I8, out=out, scale=[((2, 16), scale_dtype)], **options)


def of_lists(x=None, **options):
    """One x and several weights."""
    options = {"weight": [(8, 16), (8, 16)]} | options
    return grouped(x or (4, 8), **options)


def separate(x=((2, 8), (3, 8)), split_item=0, groups=None):
    return grouped(list(x), [(8, 16), (8, 16)], groups=groups, split_item=split_item, group_type=-1)


def transposed(rows):
    x = npu((8, 4)).t() if rows == "transposed" else npu((4, 8))
    return torch_npu.npu_grouped_matmul(
        x=[x], weight=[npu((2, 8, 16))], group_list=numbers((1, 3)), split_item=2, group_type=0, group_list_type=1
    )


def dequant(
    x=(4, 128), dtype=I32, weight=(2, 128), weight_dtype=F32, activation=(4,), activation_dtype=F32, quant=None, quant_dtype=F32, bias=None, bias_dtype=I32, groups=(1, 3), groups_dtype=I64, mode=0
):  # fmt: skip
    given = {
        "weight_scale": None if weight is None else npu(weight, weight_dtype),
        "activation_scale": None if activation is None else npu(activation, activation_dtype),
        "quant_scale": None if quant is None else npu(quant, quant_dtype),
        "bias": None if bias is None else npu(bias, bias_dtype),
        "group_index": numbers(groups, groups_dtype),
    }
    return torch_npu.npu_dequant_swiglu_quant(
        npu(x, dtype), activate_left=True, quant_mode=1, swiglu_mode=mode, **given
    )


def floating(dtype=BF16, **options):
    return dequant(dtype=dtype, **({"weight": None, "activation": None} | options))


def fused(groups=(1, 4), groups_dtype=I64, scale=(2, 16), scale_dtype=F32, weight_format=29):
    weight = torch_npu.npu_format_cast(npu((2, 8, 16), I8), weight_format)
    return torch_npu.npu_grouped_matmul_swiglu_quant(
        npu((4, 8), I8), weight, numbers(groups, groups_dtype), npu(scale, scale_dtype), npu((4,), F32)
    )


CASES = {
    "npu_grouped_matmul.dtype": case(lambda: grouped(dtype=I32), lambda: grouped(dtype=F32), lambda: grouped(dtype=F16)),
    "npu_grouped_matmul.weight-dtype": Case(
        breaks=[lambda: grouped(weight_dtype=F16), lambda: int8(weight_dtype=BF16)], edges=[grouped, int8]
    ),
    "npu_grouped_matmul.rank": case(lambda: grouped((1, 4, 8)), lambda: grouped((4, 8))),
    "npu_grouped_matmul.separate-rank": Case(
        breaks=[lambda: separate(((8,), (8,))), lambda: separate(((1,) * 6 + (8,),) * 2)],
        edges=[lambda: separate(((1,) * 5 + (8,),) * 2)],
    ),
    "npu_grouped_matmul.weight-rank": case(lambda: of_lists(weight=[(8, 16), (1, 8, 16)]), of_lists),
    "npu_grouped_matmul.k": case(lambda: grouped(weight=(2, 4, 16)), lambda: grouped(weight=(2, 8, 16))),
    "npu_grouped_matmul.one-n": case(lambda: of_lists(weight=[(8, 16), (8, 4)]), of_lists),
    "npu_grouped_matmul.list-length": case(
        lambda: of_lists(weight=[(8, 1)] * 129, groups=(0,) * 128 + (4,)), lambda: of_lists(weight=[(8, 1)] * 128, groups=(0,) * 127 + (4,))
    ),
    "npu_grouped_matmul.inner-size": case(
        lambda: grouped((1, 65536), (2, 65536, 1), groups=(0, 1)), lambda: grouped((1, 65535), (2, 65535, 1), groups=(0, 1))
    ),
    "npu_grouped_matmul.x-transposed": case(lambda: transposed("transposed"), lambda: transposed("as they are")),
    "npu_grouped_matmul.group-type": case(lambda: grouped(group_type=1), lambda: grouped(group_type=0), separate),
    "npu_grouped_matmul.group-list-type": case(lambda: grouped(kind=2), lambda: grouped(kind=0), lambda: grouped(kind=1)),
    "npu_grouped_matmul.split-item": case(lambda: grouped(split_item=1), lambda: grouped(split_item=2), lambda: grouped(split_item=3)),
    "npu_grouped_matmul.separate-split-item": case(lambda: separate(split_item=2), lambda: separate(split_item=1)),
    "npu_grouped_matmul.separate-group-list": case(lambda: separate(groups=(2, 3)), separate),
    "npu_grouped_matmul.group-list-given": case(lambda: grouped(groups=None), grouped),
    "npu_grouped_matmul.groups-dtype": case(lambda: grouped(groups_dtype=I32), grouped),
    "npu_grouped_matmul.groups-rank": case(lambda: grouped(groups=((1, 3),)), grouped),
    "npu_grouped_matmul.groups": Case(
        breaks=[lambda: grouped(groups=(-1, 3)), lambda: grouped(groups=(3, 1), kind=0), lambda: grouped(groups=(1, 4))],
        edges=[lambda: grouped(groups=(0, 4)), lambda: grouped(groups=(4, 4), kind=0)],
    ),
    "npu_grouped_matmul.groups-length": case(lambda: grouped(groups=(1, 2, 1)), lambda: grouped(groups=(1, 3))),
    "npu_grouped_matmul.more-than-one-count": case(
        lambda: grouped(weight=(1, 8, 16), groups=(4,)), grouped, lambda: grouped(weight=(1, 8, 16), groups=(4,), kind=0)
    ),
    "npu_grouped_matmul.most-groups": case(
        lambda: grouped(weight=(1025, 8, 1), groups=(0,) * 1024 + (4,)), lambda: grouped(weight=(1024, 8, 1), groups=(0,) * 1023 + (4,))
    ),
    "npu_grouped_matmul.groups-of-each-x": case(
        lambda: of_lists([(1, 8), (3, 8)], groups=(2, 2)), lambda: of_lists([(1, 8), (3, 8)], groups=(1, 3))
    ),
    "npu_grouped_matmul.float-output": case(lambda: grouped(out=F32), lambda: grouped(out=BF16)),
    "npu_grouped_matmul.float-scales": case(lambda: grouped(scale=[((2, 16), BF16)]), grouped),
    "npu_grouped_matmul.float-bias": Case(
        breaks=[lambda: grouped(bias=[((2, 16), BF16)]), lambda: grouped(dtype=F16, bias=[((2, 16), F32)])],
        edges=[lambda: grouped(bias=[((2, 16), F32)]), lambda: grouped(dtype=F16, bias=[((2, 16), F16)])],
    ),
    "npu_grouped_matmul.int8-bias": case(lambda: int8(bias=[((2, 16), F32)]), lambda: int8(bias=[((2, 16), I32)])),
    "npu_grouped_matmul.int8-output": Case(
        breaks=[lambda: int8(F16, BF16), lambda: int8(BF16, F32)], edges=[lambda: int8(F16, F32), lambda: int8(BF16, BF16)]
    ),
    "npu_grouped_matmul.per-token-scale-dtype": case(
        lambda: int8(per_token_scale=[((4,), BF16)]), lambda: int8(per_token_scale=[((4,), F32)])
    ),
    "npu_grouped_matmul.per-token-scale-length": case(
        lambda: int8(per_token_scale=[((4,), F32)] * 2), lambda: int8(per_token_scale=[((4,), F32)])
    ),
    "npu_grouped_matmul.parameters-length": case(
        lambda: grouped(bias=[((2, 16), F32)] * 2), lambda: grouped(bias=[((2, 16), F32)])
    ),
    "npu_dequant_swiglu_quant.shape": Case(
        breaks=[lambda: floating(x=(4, 127), groups=None), lambda: floating(x=(4, 1, 128))], edges=[lambda: floating(x=(4, 2), groups=None)]
    ),
    "npu_dequant_swiglu_quant.dtype": Case(breaks=[lambda: floating(F32), lambda: floating(I8)], edges=[floating, lambda: floating(F16)]),
    "npu_dequant_swiglu_quant.int32-weight-scale": case(lambda: dequant(weight=None), dequant),
    "npu_dequant_swiglu_quant.int32-activation-scale": case(lambda: dequant(activation=None), dequant),
    "npu_dequant_swiglu_quant.float-scales": case(lambda: floating(activation=(4,)), floating),
    "npu_dequant_swiglu_quant.weight-scale-dtype": case(lambda: dequant(weight_dtype=BF16), dequant),
    "npu_dequant_swiglu_quant.parameters-dtype": case(
        lambda: dequant(quant=(2, 64), quant_dtype=I32), lambda: dequant(quant=(2, 64), quant_dtype=BF16)
    ),
    "npu_dequant_swiglu_quant.parameters-shape": case(lambda: dequant(weight=(1, 128)), lambda: dequant(weight=(2, 128))),
    "npu_dequant_swiglu_quant.activation-scale-dtype": case(lambda: dequant(activation_dtype=BF16), dequant),
    "npu_dequant_swiglu_quant.activation-scale-shape": case(lambda: dequant(activation=(3,)), lambda: dequant(activation=(4,))),
    "npu_dequant_swiglu_quant.bias-dtype": case(
        lambda: dequant(weight=(1, 128), bias=(128,), bias_dtype=F32, groups=None), lambda: dequant(weight=(1, 128), bias=(128,), groups=None)
    ),
    "npu_dequant_swiglu_quant.grouped-bias": case(
        lambda: dequant(bias=(128,)), lambda: dequant(weight=(1, 128), bias=(128,), groups=None)
    ),
    "npu_dequant_swiglu_quant.groups-dtype": case(lambda: dequant(groups_dtype=I32), dequant),
    "npu_dequant_swiglu_quant.groups-rank": case(lambda: dequant(groups=((1, 3),)), dequant),
    "npu_dequant_swiglu_quant.groups": Case(
        breaks=[lambda: dequant(groups=(-1, 3)), lambda: dequant(groups=(2, 3))], edges=[lambda: dequant(groups=(0, 4))]
    ),
    "npu_dequant_swiglu_quant.size": case(
        lambda: dequant((4, 21120), weight=(2, 21120)), lambda: dequant((4, 20992), weight=(2, 20992))
    ),
    "npu_dequant_swiglu_quant.alignment": case(
        lambda: dequant((4, 192), weight=(2, 192)), lambda: dequant((4, 256), weight=(2, 256))
    ),
    "npu_dequant_swiglu_quant.swiglu-mode": case(lambda: dequant(mode=2), lambda: dequant(mode=1)),
    "npu_grouped_matmul_swiglu_quant.groups-dtype": case(lambda: fused(groups_dtype=I32), fused),
    "npu_grouped_matmul_swiglu_quant.groups-rank": case(lambda: fused(groups=((1, 4),)), fused),
    "npu_grouped_matmul_swiglu_quant.groups": case(lambda: fused(groups=(1, 5)), lambda: fused(groups=(4, 4))),
    "npu_grouped_matmul_swiglu_quant.weight-format": case(lambda: fused(weight_format=2), fused),
    "npu_grouped_matmul_swiglu_quant.parameters-dtype": case(lambda: fused(scale_dtype=I32), lambda: fused(scale_dtype=BF16)),
    "npu_grouped_matmul_swiglu_quant.parameters-shape": case(lambda: fused(scale=(2, 8)), fused),
}  # fmt: skip
