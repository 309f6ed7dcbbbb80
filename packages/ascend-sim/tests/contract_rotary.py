# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of rotary embeddings."""

import torch
import torch_npu
from contract_cases import Case, case

BF16, F16, F32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64


def npu(shape, dtype=BF16):
    return torch.ones(shape, dtype=dtype).npu()


def rotary_mul(x=(1, 2, 4, 64), r1=None, r2=None, dtype=BF16, r2_dtype=None, mode="half", rotate=None):
    r1 = r1 or (1, x[1], 1, x[3])
    matrix = None if rotate is None else npu(rotate, dtype)
    return torch_npu.npu_rotary_mul(npu(x, dtype), npu(r1, dtype), npu(r2 or r1, r2_dtype or dtype), mode, matrix)


def apply_rotary(query=(2, 4, 64), key=None, angles=None, dtype=BF16, key_dtype=None, layout="TND", mode="half"):
    angles = npu(angles or (*query[:-2], 1, query[-1]), dtype)
    return torch_npu.npu_apply_rotary_pos_emb(
        npu(query, dtype), npu(key or query, key_dtype or dtype), angles, angles.clone(), layout, mode
    )


def interleave_rope(size=64, dtype=BF16, cos_dtype=None):
    x, angle = npu((1, 2, 3, size), dtype), npu((1, 1, 3, size), cos_dtype or dtype)
    return torch_npu.npu_interleave_rope(x, angle, angle)


def mrope(
    query=(2, 128), rotary=64, dtype=BF16, positions=(0, 1), positions_dtype=I64, table=8, mode="half", sections=None
):
    where = torch.tensor(positions, dtype=positions_dtype).npu()
    return torch_npu.npu_mrope(
        where, npu(query, dtype), npu((2, 128), dtype), npu((table, rotary), dtype), 128, mrope_section=sections or [0, 0, 0], rotary_mode=mode
    )  # fmt: skip


CASES = {
    "npu_rotary_mul.rank": case(
        lambda: torch_npu.npu_rotary_mul(npu((2, 4, 64)), npu((1, 2, 1, 64)), npu((1, 2, 1, 64))), rotary_mul
    ),
    "npu_rotary_mul.dtype": case(lambda: rotary_mul(dtype=I32), lambda: rotary_mul(dtype=F32), lambda: rotary_mul(dtype=F16)),
    "npu_rotary_mul.mode": case(lambda: rotary_mul(mode="quarter"), lambda: rotary_mul(mode="interleave")),
    "npu_rotary_mul.even-size": case(lambda: rotary_mul((1, 2, 4, 63)), lambda: rotary_mul((1, 2, 4, 62))),
    "npu_rotary_mul.size": case(lambda: rotary_mul((1, 2, 4, 896)), lambda: rotary_mul((1, 2, 4, 894))),
    "npu_rotary_mul.r1-size": case(lambda: rotary_mul(r1=(1, 2, 1, 32)), lambda: rotary_mul(r1=(1, 2, 1, 64))),
    "npu_rotary_mul.r2-shape": case(lambda: rotary_mul(r2=(1, 2, 4, 64)), lambda: rotary_mul(r2=(1, 2, 1, 64))),
    "npu_rotary_mul.r2-dtype": case(lambda: rotary_mul(r2_dtype=F32), lambda: rotary_mul(r2_dtype=BF16)),
    "npu_rotary_mul.layout": Case(
        breaks=[lambda: rotary_mul((2, 3, 4, 64), (1, 1, 1, 64)), lambda: rotary_mul((2, 3, 4, 64), (2, 3, 1, 64), mode="interleave")],
        edges=[lambda: rotary_mul((2, 3, 4, 64), (2, 3, 1, 64)), lambda: rotary_mul((2, 3, 4, 64), (1, 3, 1, 64), mode="interleave")],
    ),
    "npu_rotary_mul.heads": Case(
        breaks=[lambda: rotary_mul((1, 2, 1000, 64)), lambda: rotary_mul((2, 3, 500, 64), (1, 3, 1, 64), mode="interleave")],
        edges=[lambda: rotary_mul((1, 2, 999, 64)), lambda: rotary_mul((2, 3, 499, 64), (1, 3, 1, 64), mode="interleave")],
    ),
    "npu_rotary_mul.rotate-shape": case(lambda: rotary_mul(rotate=(64, 32)), lambda: rotary_mul(rotate=(64, 64))),
    "npu_apply_rotary_pos_emb.layout": case(
        lambda: apply_rotary((1, 4, 2, 64), angles=(1, 1, 2, 64), layout="BNSD"), lambda: apply_rotary((1, 2, 4, 64), layout="BSND")
    ),
    "npu_apply_rotary_pos_emb.mode": case(lambda: apply_rotary(mode="interleave"), apply_rotary),
    "npu_apply_rotary_pos_emb.rank": case(lambda: apply_rotary(layout="BSND"), lambda: apply_rotary((1, 2, 4, 64), layout="BSND")),
    "npu_apply_rotary_pos_emb.dtype": case(lambda: apply_rotary(dtype=I32), lambda: apply_rotary(dtype=F32)),
    "npu_apply_rotary_pos_emb.one-dtype": case(lambda: apply_rotary(key_dtype=F16), lambda: apply_rotary(key_dtype=BF16)),
    "npu_apply_rotary_pos_emb.not-empty": case(lambda: apply_rotary((0, 4, 64)), lambda: apply_rotary((1, 4, 64))),
    "npu_apply_rotary_pos_emb.tokens": case(lambda: apply_rotary(key=(3, 4, 64)), lambda: apply_rotary(key=(2, 1, 64))),
    "npu_apply_rotary_pos_emb.one-size": case(lambda: apply_rotary(key=(2, 4, 128)), lambda: apply_rotary(key=(2, 4, 64))),
    "npu_apply_rotary_pos_emb.size": Case(
        breaks=[lambda: apply_rotary((2, 4, 96)), lambda: apply_rotary((2, 4, 256))],
        edges=[lambda: apply_rotary((2, 4, 64)), lambda: apply_rotary((2, 4, 128))],
    ),
    "npu_apply_rotary_pos_emb.angle-heads": case(
        lambda: apply_rotary(angles=(2, 4, 64)), lambda: apply_rotary(angles=(2, 1, 64))
    ),
    "npu_interleave_rope.dtype": Case(
        breaks=[lambda: interleave_rope(dtype=F32), lambda: interleave_rope(cos_dtype=F16)],
        edges=[lambda: interleave_rope(dtype=F16)],
    ),
    "npu_interleave_rope.size": case(lambda: interleave_rope(32), lambda: interleave_rope(64)),
    "npu_mrope.rank": case(lambda: mrope(query=(2, 1, 128)), mrope),
    "npu_mrope.dtype": case(lambda: mrope(dtype=torch.float64), lambda: mrope(dtype=F32)),
    "npu_mrope.mode": case(lambda: mrope(mode="quarter"), lambda: mrope(mode="interleave")),
    "npu_mrope.positions-dtype": case(lambda: mrope(positions_dtype=F32), lambda: mrope(positions_dtype=I32)),
    "npu_mrope.positions-shape": case(
        lambda: mrope(positions=(0, 1, 2)), lambda: mrope(positions=((0, 1), (0, 1), (0, 1)), sections=[16, 8, 8])
    ),
    "npu_mrope.positions": case(lambda: mrope(positions=(0, 8)), lambda: mrope(positions=(0, 7))),
    "npu_mrope.sections": case(
        lambda: mrope(positions=((0, 1), (0, 1), (0, 1)), sections=[16, 8, 9]),
        lambda: mrope(positions=((0, 1), (0, 1), (0, 1)), sections=[16, 8, 8]),
    ),
    "npu_mrope.rotary-size": case(lambda: mrope(rotary=48), lambda: mrope(rotary=32), lambda: mrope(rotary=48, dtype=F32)),
}  # fmt: skip
