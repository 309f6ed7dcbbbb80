# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of the paged cache, the latent cache, and the merge of partial attentions."""

from functools import partial

import torch
import torch_npu
from ascend_sim.contracts import contract
from contract_cases import Case, case


def scatter(
    key=(2, 3, 8),
    value=None,
    key_cache=(4, 16, 3, 8),
    value_cache=None,
    dtypes=(torch.bfloat16,) * 4,
    mode="Norm",
    tensors=(),
):
    """Two tokens into a cache of four blocks of 16. `tensors`: in the place of those of the shapes, by name."""
    shapes = (key, value or key, key_cache, value_cache or key_cache)
    made = [torch.zeros(shape, dtype=dtype).npu() for shape, dtype in zip(shapes, dtypes, strict=True)]
    names = ("key", "value", "key_cache", "value_cache")
    arguments = dict(zip(names, made, strict=True)) | {"slot_mapping": torch.tensor([1, 5], dtype=torch.int32).npu()}
    return torch_npu.npu_scatter_pa_kv_cache(**(arguments | dict(tensors)), cache_mode=mode)


def slots(*numbers, dtype=torch.int32):
    """A call with these slots."""
    return lambda: scatter(tensors={"slot_mapping": torch.tensor(numbers, dtype=dtype).npu()})


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCATTER = {
    "rank": case(lambda: scatter(key=(2, 1, 3, 8)), scatter),
    "cache-rank": case(lambda: scatter(key_cache=(64, 3, 8)), scatter),
    "cache-shape": case(lambda: scatter(key_cache=(4, 16, 3, 16)), scatter),
    "leading-sizes": case(
        lambda: scatter(value=(2, 4, 8), value_cache=(4, 16, 4, 8)), lambda: scatter(value=(2, 3, 16), value_cache=(4, 16, 3, 16))
    ),
    "cache-dtype": case(lambda: scatter(dtypes=(BF16, BF16, FP32, BF16)), lambda: scatter(dtypes=(FP32,) * 4)),
    "one-dtype": case(lambda: scatter(dtypes=(BF16, FP16, BF16, FP16)), lambda: scatter(dtypes=(FP16,) * 4)),
    "contiguous": case(lambda: scatter(tensors={"key": torch.zeros(2, 6, 8, dtype=BF16).npu()[:, :3]}), scatter),
    "cache-contiguous": case(lambda: scatter(tensors={"key_cache": torch.zeros(4, 16, 6, 8, dtype=BF16).npu()[:, :, :3]}), scatter),
    "cache-mode": case(lambda: scatter(mode="ND"), lambda: scatter(mode=None)),
    "slot-dtype": case(slots(1, 5, dtype=torch.int16), slots(1, 5, dtype=torch.int64)),
    "slot-rank": case(lambda: scatter(tensors={"slot_mapping": torch.tensor([[1, 5]], dtype=torch.int32).npu()}), slots(1, 5)),
    "slot-contiguous": case(lambda: scatter(tensors={"slot_mapping": torch.arange(4, dtype=torch.int32).npu()[::2]}), slots(0, 2)),
    "slots": case(slots(1, 2, 3), slots(1, 2)),
    "slot-most": case(slots(1, 64), slots(1, 63)),
    "slot-least": case(slots(-1, 1), slots(0, 1)),
    "slot-unique": case(slots(7, 7), slots(7, 8)),
}  # fmt: skip


def gather(dtype=BF16, cache=None, table=None, offset=16):
    """Tokens 16 to 19 of one sequence, from a cache of four blocks of 16."""
    cache = torch.zeros(4, 16, 2, 8, dtype=BF16).npu() if cache is None else cache
    table = torch.tensor([[3, 1]], dtype=torch.int32).npu() if table is None else table.npu()
    rows, length, start = (
        torch.zeros(4, 2, 8, dtype=dtype).npu(),
        torch.tensor([4]).int().npu(),
        torch.tensor([offset]).int().npu(),
    )
    return torch_npu.npu_gather_pa_kv_cache(cache, cache, table, length, rows, torch.zeros_like(rows), seq_offset=start)  # fmt: skip


GATHER = {
    "one-dtype": case(lambda: gather(dtype=FP16), gather),
    "contiguous": case(lambda: gather(cache=torch.zeros(4, 32, 2, 8, dtype=BF16).npu()[:, ::2]), gather),
    "block-table-rank": case(lambda: gather(table=torch.tensor([3, 1], dtype=torch.int32)), gather),
    "block-table-dtype": case(
        lambda: gather(table=torch.tensor([[3, 1]], dtype=torch.int16)), lambda: gather(table=torch.tensor([[3, 1]]))
    ),
    "offset": case(lambda: gather(offset=8), lambda: gather(offset=0), gather),
}


def norm_rope(dtype=BF16, rms=512, rope=64):
    """Two tokens into a latent cache of two blocks of 16."""
    kv, gamma = torch.zeros(1, 1, 2, rms + rope, dtype=dtype).npu(), torch.ones(rms, dtype=dtype).npu()
    angle = torch.zeros(1, 1, 2, rope, dtype=dtype).npu()
    caches = [torch.zeros(2, 16, 1, size, dtype=dtype).npu() for size in (rope, rms)]
    return torch_npu.npu_kv_rmsnorm_rope_cache(kv, gamma, angle, angle, torch.arange(2).npu(), *caches, cache_mode="PA")  # fmt: skip


def update(parts=2, size=32, update_type=1, out=None):
    """Partial attentions of four rows."""
    lse = [torch.zeros(4).npu() for _ in range(parts)]
    outs = [torch.zeros(4, size).npu() if out is None else out for _ in range(parts)]
    return torch_npu.npu_attention_update(lse, outs, update_type)


NUMBERS = {rule.id.partition(".")[2]: rule for rule in contract("npu_attention_update").rules}
UPDATE = {
    "update-type": case(partial(update, update_type=2), partial(update, update_type=0)),
    "parts": case(partial(update, NUMBERS["parts"].most + 1), partial(update, NUMBERS["parts"].most)),
    "head-size": Case(
        breaks=[partial(update, size=12), partial(update, size=NUMBERS["head-size"].most + 8)],
        edges=[partial(update, size=8), partial(update, size=NUMBERS["head-size"].most)],
    ),
    "contiguous": case(lambda: update(out=torch.zeros(4, 64).npu()[:, ::2]), update),
}
CASES = {
    f"{operator}.{name}": one
    for operator, cases in {
        "npu_scatter_pa_kv_cache": SCATTER,
        "npu_gather_pa_kv_cache": GATHER,
        "npu_attention_update": UPDATE,
        "npu_kv_rmsnorm_rope_cache": {
            "dtype": case(partial(norm_rope, dtype=FP32), partial(norm_rope, dtype=FP16), norm_rope),
            "sizes": Case(breaks=[partial(norm_rope, rms=256), partial(norm_rope, rope=32)], edges=[norm_rope]),
        },
    }.items()
    for name, one in cases.items()
}
