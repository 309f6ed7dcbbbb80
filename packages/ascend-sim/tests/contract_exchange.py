# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of the operators that send tokens to their experts and back."""

import torch
import torch_npu
from contract_cases import Case, between

BF16, F16, F32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
LONG = "x" * 128


def npu(values, dtype=None):
    return torch.tensor(values, dtype=dtype).npu()


def place(group, experts=4, **changes):
    """The arguments that both operators have."""
    return {
        "group_ep": group.name, "ep_world_size": group.world, "ep_rank_id": group.rank, "moe_expert_num": experts,
        "expert_shard_type": 0, "shared_expert_rank_num": 0, "global_bs": 0,
    } | changes  # fmt: skip


def dispatch(
    group,
    x=(2, 64),
    dtype=BF16,
    ids=None,
    ids_dtype=I32,
    mask=None,
    experts=4,
    k=2,
    quant_mode=0,
    scales=None,
    nums=1,
    **changes,
):
    ids = ids if ids is not None else [list(range(k))] * x[0]
    return torch_npu.npu_moe_distribute_dispatch_v2(
        x=torch.ones(x, dtype=dtype).npu(), expert_ids=npu(ids, ids_dtype), x_active_mask=None if mask is None else npu(mask),
        scales=None if scales is None else torch.ones(scales).npu(), quant_mode=quant_mode, expert_token_nums_type=nums, **place(group, experts, **changes),
    )  # fmt: skip


def combine(
    group,
    x=(2, 64),
    dtype=BF16,
    ids=None,
    ids_dtype=I32,
    mask=None,
    experts=4,
    k=2,
    sent_dtype=None,
    sent_shape=None,
    **changes,
):
    """A dispatch, as it must be, and then a combine with what is asked for here."""
    size = x[1] if x[1] % 32 == 0 and x[1] <= 10240 else 64
    sent = dispatch(group, (2, size), k=min(k, 4))
    rows = sent[0].to(dtype) if sent_shape is None else torch.ones(sent_shape, dtype=dtype).npu()
    if sent_shape is None and size != x[1]:
        rows = torch.ones((len(rows), x[1]), dtype=dtype).npu()
    ids = ids if ids is not None else [list(range(k))] * 2
    wide = len(ids[0]) if isinstance(ids[0], list) else 1
    return torch_npu.npu_moe_distribute_combine_v2(
        expand_x=rows, expert_ids=npu(ids, ids_dtype), assist_info_for_combine=sent[2], ep_send_counts=sent[4],
        expert_scales=torch.ones(2, wide).npu(), x_active_mask=None if mask is None else npu(mask), **place(group, experts, **changes),
    )  # fmt: skip


def of_both(call, cube):
    """The rules that both operators have; `cube` is a call with rows of 3 dimensions."""
    return {
        "group-name": Case(
            breaks=[lambda g: call(g, group_ep=""), lambda g: call(g, group_tp=LONG)], edges=[call, lambda g: call(g, group_tp=LONG[1:])],
            break_ranks=2, edge_ranks=2,
        ),
        "ep-rank": Case(
            breaks=[lambda g: call(g, ep_rank_id=1 - g.rank), lambda g: call(g, ep_world_size=3)], edges=[call], break_ranks=2, edge_ranks=2
        ),
        "ep-world-size": between(lambda g: call(g, group_ep=g.alone, ep_world_size=1, ep_rank_id=0), call),
        "experts-of-each-rank": between(lambda g: call(g, experts=5), lambda g: call(g, experts=4)),
        "rank": between(cube, call),
        "dtype": Case(breaks=[lambda g: call(g, dtype=F32), lambda g: call(g, dtype=I32)], edges=[call], break_ranks=2, edge_ranks=2),
        "size": Case(
            breaks=[lambda g: call(g, (2, 48)), lambda g: call(g, (2, 10272))], edges=[lambda g: call(g, (2, 32)), lambda g: call(g, (2, 10240))],
            break_ranks=2, edge_ranks=2,
        ),
        "ids-dtype": between(lambda g: call(g, ids_dtype=I64), call),
        "ids-rank": between(lambda g: call(g, ids=[0, 1]), call),
        "ids": Case(
            breaks=[lambda g: call(g, ids=[[0, 4], [0, 1]]), lambda g: call(g, ids=[[0, -1], [0, 1]])],
            edges=[call], break_ranks=2, edge_ranks=2,
        ),
        "ids-differ": between(lambda g: call(g, ids=[[1, 1], [0, 1]]), call),
        "mask": between(lambda g: call(g, mask=[1, 1]), lambda g: call(g, mask=[True, True])),
        "mask-order": between(lambda g: call(g, mask=[False, True]), lambda g: call(g, mask=[True, True])),
    }  # fmt: skip


CASES = {
    **{f"npu_moe_distribute_dispatch_v2.{name}": one for name, one in of_both(dispatch, lambda g: dispatch(g, (2, 1, 64))).items()},
    **{f"npu_moe_distribute_combine_v2.{name}": one for name, one in of_both(combine, lambda g: combine(g, sent_shape=(8, 1, 64))).items()},
    "npu_moe_distribute_dispatch_v2.experts": between(lambda g: dispatch(g, experts=1026), lambda g: dispatch(g, experts=1024)),
    "npu_moe_distribute_combine_v2.experts": between(lambda g: combine(g, experts=1026), combine),
    "npu_moe_distribute_dispatch_v2.top-k": between(
        lambda g: dispatch(g, experts=32, k=17), lambda g: dispatch(g, experts=32, k=16), lambda g: dispatch(g, k=1)
    ),
    "npu_moe_distribute_combine_v2.top-k": between(lambda g: combine(g, experts=32, k=17), lambda g: combine(g, k=1)),
    "npu_moe_distribute_dispatch_v2.ids-shape": between(lambda g: dispatch(g, ids=[[0, 1]]), dispatch),
    "npu_moe_distribute_dispatch_v2.batch": between(lambda g: dispatch(g, (513, 32)), lambda g: dispatch(g, (512, 32))),
    "npu_moe_distribute_dispatch_v2.global-bs": Case(
        breaks=[lambda g: dispatch(g, (2 + g.rank, 64)), lambda g: dispatch(g, global_bs=6)],
        edges=[lambda g: dispatch(g, (2 + g.rank, 64), global_bs=6), lambda g: dispatch(g, global_bs=4)],
        break_ranks=2, edge_ranks=2,
    ),
    "npu_moe_distribute_dispatch_v2.mask-of-equal-batches": between(
        lambda g: dispatch(g, (2 + g.rank, 64), global_bs=6, mask=[True] + [False] * (1 + g.rank)),
        lambda g: dispatch(g, (2 + g.rank, 64), global_bs=6, mask=[True] * (2 + g.rank)),
    ),
    "npu_moe_distribute_dispatch_v2.token-nums-type": between(lambda g: dispatch(g, nums=2), lambda g: dispatch(g, nums=0)),
    "npu_moe_distribute_dispatch_v2.scales": between(
        lambda g: dispatch(g, scales=(4, 64)), lambda g: dispatch(g, scales=(4, 64), quant_mode=2)
    ),
}  # fmt: skip
