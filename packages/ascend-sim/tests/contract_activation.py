# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of activations, of prefetching, and of filters before sampling."""

import torch
import torch_npu
from contract_cases import Case, case

BF16, F16, F32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64


def swiglu(shape=(2, 8), dtype=BF16, dim=-1):
    return torch_npu.npu_swiglu(torch.ones(shape, dtype=dtype).npu(), dim)


def clipped(shape=(2, 8), dtype=BF16, dim=-1, groups=None, transposed=False):
    x = torch.ones(shape, dtype=dtype).npu()
    return torch_npu.npu_clipped_swiglu(
        x.t() if transposed else x, dim=dim, group_index=None if groups is None else groups.npu()
    )


def prefetch(max_size=1, offset=0):
    weight = torch.ones(2, 8, dtype=BF16).npu()
    return torch_npu.npu_prefetch(weight, weight, max_size, offset)


def top_k_top_p(logits=(2, 2048), dtype=BF16, p=(0.5, 0.5), p_dtype=None, k=(8, 8), k_dtype=I32):
    return torch_npu.npu_top_k_top_p(
        torch.ones(logits, dtype=dtype).npu(),
        None if p is None else torch.tensor(p, dtype=p_dtype or dtype).npu(),
        None if k is None else torch.tensor(k, dtype=k_dtype).npu(),
    )


CASES = {
    "npu_swiglu.dtype": case(lambda: swiglu(dtype=I32), lambda: swiglu(dtype=F32), lambda: swiglu(dtype=F16)),
    "npu_swiglu.rank": Case(
        breaks=[lambda: swiglu((1,) * 8 + (8,))], edges=[lambda: swiglu((8,)), lambda: swiglu((1,) * 7 + (8,))]
    ),
    "npu_swiglu.dim": case(lambda: swiglu(dim=2), lambda: swiglu(dim=-2), lambda: swiglu(dim=1)),
    "npu_swiglu.even": case(lambda: swiglu((2, 7)), lambda: swiglu((3, 8))),
    "npu_clipped_swiglu.dtype": case(lambda: clipped(dtype=I32), lambda: clipped(dtype=F32), lambda: clipped(dtype=F16)),
    "npu_clipped_swiglu.rank": case(lambda: clipped((8,)), lambda: clipped((1, 8))),
    "npu_clipped_swiglu.contiguous": case(lambda: clipped((8, 2), transposed=True), lambda: clipped((2, 8))),
    "npu_clipped_swiglu.even": case(lambda: clipped((2, 7)), lambda: clipped((3, 8))),
    "npu_clipped_swiglu.dim": case(lambda: clipped(dim=2), lambda: clipped(dim=-2)),
    "npu_clipped_swiglu.group-index-rank": case(
        lambda: clipped(groups=torch.ones(1, 1, dtype=I64)), lambda: clipped(groups=torch.ones(1, dtype=I64))
    ),
    "npu_clipped_swiglu.group-index-dtype": case(
        lambda: clipped(groups=torch.ones(1, dtype=I32)), lambda: clipped(groups=torch.ones(1, dtype=I64))
    ),
    "npu_prefetch.max-size": case(lambda: prefetch(0), lambda: prefetch(1)),
    "npu_prefetch.offset": Case(
        breaks=[lambda: prefetch(1, -1), lambda: prefetch(1, 32)], edges=[lambda: prefetch(1, 0), lambda: prefetch(1, 31)]
    ),
    "npu_top_k_top_p.rank": case(lambda: top_k_top_p((2, 1, 2048)), lambda: top_k_top_p((2, 2048))),
    "npu_top_k_top_p.dtype": case(lambda: top_k_top_p(dtype=I32, p=None), lambda: top_k_top_p(dtype=F32, p=None)),
    "npu_top_k_top_p.p-or-k": case(lambda: top_k_top_p(p=None, k=None), lambda: top_k_top_p(p=None)),
    "npu_top_k_top_p.p-shape": case(lambda: top_k_top_p(p=(0.5,)), lambda: top_k_top_p(p=(0.5, 0.5))),
    "npu_top_k_top_p.p-dtype": case(lambda: top_k_top_p(p_dtype=F32), lambda: top_k_top_p(p_dtype=BF16)),
    "npu_top_k_top_p.p-range": Case(
        breaks=[lambda: top_k_top_p(p=(0.5, 1.5)), lambda: top_k_top_p(p=(-0.5, 1.0))],
        edges=[lambda: top_k_top_p(p=(0.0, 1.0))],
    ),
    "npu_top_k_top_p.k-shape": case(lambda: top_k_top_p(k=(8,)), lambda: top_k_top_p(k=(8, 8))),
    "npu_top_k_top_p.k-dtype": case(lambda: top_k_top_p(k_dtype=I64), lambda: top_k_top_p(k_dtype=I32)),
    "npu_top_k_top_p.k-range": Case(
        breaks=[lambda: top_k_top_p(k=(0, 8)), lambda: top_k_top_p(k=(1025, 8)), lambda: top_k_top_p((2, 16), k=(17, 8))],
        edges=[lambda: top_k_top_p(k=(1, 1024)), lambda: top_k_top_p((2, 16), k=(16, 8))],
    ),
}  # fmt: skip
