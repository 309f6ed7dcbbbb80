# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of products that are fused with a collective."""

import torch
import torch_npu
from contract_cases import Case, between

BF16, F16, F32, I8, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32


def npu(shape, dtype=BF16):
    return torch.ones(shape, dtype=dtype).npu()


def maybe(shape, dtype):
    return None if shape is None else npu(shape, dtype)


def reduce(
    group,
    x=(4, 16),
    w=(16, 8),
    dtype=BF16,
    w_dtype=None,
    bias=None,
    bias_dtype=None,
    scale=None,
    scale_dtype=BF16,
    token=None,
    token_dtype=F32,
    transposed=False,
    **options,
):
    x1 = npu(x[::-1], dtype).t() if transposed else npu(x, dtype)
    return torch_npu.npu_mm_all_reduce_base(
        x1, npu(w, w_dtype or dtype), group.name if group else "none", bias=maybe(bias, bias_dtype or dtype),
        dequant_scale=maybe(scale, scale_dtype), pertoken_scale=maybe(token, token_dtype), **options,
    )  # fmt: skip


def reduce8(group, **options):
    return reduce(group, dtype=I8, **({"scale": (8,)} | options))


def scatter(
    group,
    x=(4, 256),
    w=(256, 8),
    dtype=BF16,
    w_dtype=None,
    bias=None,
    x1=None,
    x1_dtype=F32,
    x2=None,
    x2_dtype=F32,
    transposed=False,
    **options,
):
    rows = npu(x[::-1], dtype).t() if transposed else npu(x, dtype)
    return torch_npu.npu_mm_reduce_scatter_base(
        rows, npu(w, w_dtype or dtype), group.name, group.world, bias=maybe(bias, dtype), x1_scale=maybe(x1, x1_dtype), x2_scale=maybe(x2, x2_dtype), **options
    )  # fmt: skip


def scatter8(group, **options):
    return scatter(group, dtype=I8, **({"x1": (4, 1), "x2": (1, 8), "comm_mode": "aiv"} | options))


CASES = {
    "npu_mm_all_reduce_base.chip": Case(breaks=[lambda: reduce(None)], edges=[reduce], edge_ranks=2),
    "npu_mm_all_reduce_base.dtype": Case(
        breaks=[lambda g: reduce(g, dtype=F32), lambda g: reduce(g, dtype=I32)], edges=[lambda g: reduce(g, dtype=F16), reduce8], break_ranks=2, edge_ranks=2
    ),
    "npu_mm_all_reduce_base.x2-dtype": between(lambda g: reduce(g, w_dtype=F16), reduce),
    "npu_mm_all_reduce_base.rank": between(lambda g: reduce(g, (1, 1, 4, 16)), lambda g: reduce(g, (1, 4, 16)), reduce),
    "npu_mm_all_reduce_base.x2-rank": between(lambda g: reduce(g, w=(1, 16, 8)), reduce),
    "npu_mm_all_reduce_base.k": between(lambda g: reduce(g, w=(8, 8)), reduce),
    "npu_mm_all_reduce_base.not-empty": between(lambda g: reduce(g, (0, 16)), lambda g: reduce(g, (1, 16))),
    "npu_mm_all_reduce_base.x1-transposed": between(lambda g: reduce(g, transposed=True), reduce),
    "npu_mm_all_reduce_base.reduce-op": between(lambda g: reduce(g, reduce_op="max"), lambda g: reduce(g, reduce_op="sum")),
    "npu_mm_all_reduce_base.comm-turn": between(lambda g: reduce(g, comm_turn=1), lambda g: reduce(g, comm_turn=0)),
    "npu_mm_all_reduce_base.bias-shape": between(lambda g: reduce(g, bias=(1, 8)), lambda g: reduce(g, bias=(8,))),
    "npu_mm_all_reduce_base.bias-dtype": Case(
        breaks=[lambda g: reduce(g, bias=(8,), bias_dtype=F16), lambda g: reduce8(g, bias=(8,), bias_dtype=BF16)],
        edges=[lambda g: reduce(g, bias=(8,)), lambda g: reduce8(g, bias=(8,), bias_dtype=I32)], break_ranks=2, edge_ranks=2,
    ),
    "npu_mm_all_reduce_base.scales": Case(
        breaks=[lambda g: reduce(g, scale=(8,)), lambda g: reduce8(g, scale=None)], edges=[reduce, reduce8], break_ranks=2, edge_ranks=2
    ),
    "npu_mm_all_reduce_base.dequant-scale-shape": between(
        lambda g: reduce8(g, scale=(8, 1)), lambda g: reduce8(g, scale=(1,)), lambda g: reduce8(g, scale=(1, 8))
    ),
    "npu_mm_all_reduce_base.float32-scale": between(
        lambda g: reduce8(g, scale_dtype=F32), lambda g: reduce8(g, scale_dtype=F32, token=(4,))
    ),
    "npu_mm_all_reduce_base.pertoken-scale-shape": between(lambda g: reduce8(g, token=(4, 1)), lambda g: reduce8(g, token=(4,))),
    "npu_mm_all_reduce_base.pertoken-scale-dtype": between(
        lambda g: reduce8(g, token=(4,), token_dtype=BF16), lambda g: reduce8(g, token=(4,))
    ),
    "npu_mm_all_reduce_base.int8-k": between(
        lambda g: reduce8(g, x=(1, 65536), w=(65536, 8)), lambda g: reduce8(g, x=(1, 65535), w=(65535, 8))
    ),
    "npu_mm_all_reduce_base.ranks": between(reduce, reduce, break_ranks=3),
    "npu_mm_reduce_scatter_base.dtype": Case(
        breaks=[lambda g: scatter(g, dtype=F32), lambda g: scatter(g, dtype=I32)], edges=[lambda g: scatter(g, dtype=F16), scatter8], break_ranks=2, edge_ranks=2
    ),
    "npu_mm_reduce_scatter_base.x2-dtype": between(lambda g: scatter(g, w_dtype=F16), scatter),
    "npu_mm_reduce_scatter_base.rank": between(lambda g: scatter(g, (1, 4, 256)), scatter),
    "npu_mm_reduce_scatter_base.x2-rank": between(lambda g: scatter(g, w=(1, 256, 8)), scatter),
    "npu_mm_reduce_scatter_base.k": between(lambda g: scatter(g, w=(128, 8)), scatter),
    "npu_mm_reduce_scatter_base.not-empty": between(lambda g: scatter(g, (0, 256)), lambda g: scatter(g, (2, 256))),
    "npu_mm_reduce_scatter_base.x1-transposed": between(lambda g: scatter(g, transposed=True), scatter),
    "npu_mm_reduce_scatter_base.reduce-op": between(lambda g: scatter(g, reduce_op="max"), lambda g: scatter(g, reduce_op="sum")),
    "npu_mm_reduce_scatter_base.comm-turn": between(lambda g: scatter(g, comm_turn=1), lambda g: scatter(g, comm_turn=0)),
    "npu_mm_reduce_scatter_base.bias": between(lambda g: scatter(g, bias=(8,)), scatter),
    "npu_mm_reduce_scatter_base.comm-mode": between(
        lambda g: scatter(g, comm_mode="host"), lambda g: scatter(g, comm_mode="aiv"), lambda g: scatter(g, comm_mode="ai_cpu")
    ),
    "npu_mm_reduce_scatter_base.int8-comm-mode": between(lambda g: scatter8(g, comm_mode="ai_cpu"), scatter8),
    "npu_mm_reduce_scatter_base.ai-cpu-k": Case(
        breaks=[lambda g: scatter(g, (4, 255), (255, 8)), lambda g: scatter(g, (2, 65535), (65535, 1))],
        edges=[lambda g: scatter(g, (4, 256), (256, 8)), lambda g: scatter(g, (2, 65534), (65534, 1)), lambda g: scatter(g, (4, 8), (8, 8), comm_mode="aiv")],
        break_ranks=2, edge_ranks=2,
    ),
    "npu_mm_reduce_scatter_base.ranks": between(lambda g: scatter(g, (3, 256)), scatter, break_ranks=3),
    "npu_mm_reduce_scatter_base.rows": between(lambda g: scatter(g, (3, 256)), lambda g: scatter(g, (2, 256))),
    "npu_mm_reduce_scatter_base.scales": Case(
        breaks=[lambda g: scatter8(g, x2=None), lambda g: scatter(g, x2=(1, 8)), lambda g: scatter(g, output_dtype=BF16)],
        edges=[scatter8, scatter], break_ranks=2, edge_ranks=2,
    ),
    "npu_mm_reduce_scatter_base.x2-scale-shape": between(lambda g: scatter8(g, x2=(8,)), scatter8),
    "npu_mm_reduce_scatter_base.x1-scale": between(lambda g: scatter8(g, x1=None), scatter8),
    "npu_mm_reduce_scatter_base.x1-scale-shape": between(lambda g: scatter8(g, x1=(4,)), scatter8),
    "npu_mm_reduce_scatter_base.x1-scale-dtype": between(lambda g: scatter8(g, x1_dtype=BF16), scatter8),
    "npu_mm_reduce_scatter_base.output-dtype": Case(
        breaks=[lambda g: scatter8(g, output_dtype=F32), lambda g: scatter8(g, output_dtype=I8)],
        edges=[lambda g: scatter8(g, output_dtype=F16), lambda g: scatter8(g, output_dtype=BF16)], break_ranks=2, edge_ranks=2,
    ),
}  # fmt: skip
