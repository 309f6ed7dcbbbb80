# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of routing and of sorting tokens by expert."""

import torch
import torch_npu
from contract_cases import Case, case

BF16, F16, F32, I8, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64


def npu(shape, dtype=BF16):
    return torch.ones(shape, dtype=dtype).npu()


def gating(x=(2, 16), dtype=F32, k=2, bias=None, bias_dtype=None, **options):
    bias = None if bias is None else npu(bias, bias_dtype or dtype)
    return torch_npu.npu_moe_gating_top_k(npu(x, dtype), k, bias=bias, **options)


def gating_softmax(x=(2, 16), dtype=F32, k=2, finished=None, finished_dtype=torch.bool):
    return torch_npu.npu_moe_gating_top_k_softmax(
        npu(x, dtype), None if finished is None else npu(finished, finished_dtype), k
    )


def update(threshold_dtype=F32, mask=(True, False), world=2):
    return torch_npu.npu_moe_update_expert(
        npu((2, 2), I32), torch.tensor([[1, 0], [1, 1]], dtype=I32).npu(), expert_scales=npu((2, 2), F32),
        pruning_threshold=npu((2,), threshold_dtype), active_mask=torch.tensor(mask).npu(), local_rank_id=0, world_size=world,
    )  # fmt: skip


def re_routing(size=8, dtype=BF16):
    return torch_npu.npu_moe_re_routing(npu((2, size), dtype), npu((2, 1), I32))


def routing(
    x=(2, 8), dtype=BF16, ids=((0, 1), (1, 0)), ids_dtype=I32, scale=None, scale_dtype=F32, offset=None, **options
):
    options = {
        "expert_num": 2,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 2],
    } | options
    return torch_npu.npu_moe_init_routing_v2(
        npu(x, dtype), torch.tensor(ids, dtype=ids_dtype).npu(), scale=None if scale is None else npu(scale, scale_dtype),
        offset=None if offset is None else npu(offset, F32), **options,
    )  # fmt: skip


def permute(tokens=(2, 8), dtype=BF16, ids=((0, 1), (1, 0)), ids_dtype=I64, padded=False):
    indices = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids, dtype=ids_dtype).npu()
    return torch_npu.npu_moe_token_permute(tokens=npu(tokens, dtype), indices=indices, padded_mode=padded)


def unpermute(rows=(4, 8), dtype=BF16, order=(0, 3, 1, 2), order_dtype=I32, probs=None, probs_dtype=BF16, padded=False):
    given = probs if isinstance(probs, torch.Tensor) or probs is None else npu(probs, probs_dtype)
    return torch_npu.npu_moe_token_unpermute(
        permuted_tokens=npu(rows, dtype),
        sorted_indices=torch.tensor(order, dtype=order_dtype).npu(),
        probs=given,
        padded_mode=padded,
    )


def many(count):
    """Ids of one token each, in one dimension."""
    return torch.zeros(count, dtype=I32).npu()


CASES = {
    "npu_moe_gating_top_k.rank": case(lambda: gating((2, 1, 16)), gating),
    "npu_moe_gating_top_k.dtype": case(lambda: gating(dtype=I32), lambda: gating(dtype=BF16), lambda: gating(dtype=F16)),
    "npu_moe_gating_top_k.experts": case(lambda: gating((1, 2049)), lambda: gating((1, 2048))),
    "npu_moe_gating_top_k.k": Case(
        breaks=[lambda: gating(k=0), lambda: gating(k=17), lambda: gating(k=9, k_group=2, group_count=4)],
        edges=[lambda: gating(k=1), lambda: gating(k=16), lambda: gating(k=8, k_group=2, group_count=4)],
    ),
    "npu_moe_gating_top_k.bias-shape": case(lambda: gating(bias=(8,)), lambda: gating(bias=(16,))),
    "npu_moe_gating_top_k.bias-dtype": case(lambda: gating(bias=(16,), bias_dtype=BF16), lambda: gating(bias=(16,))),
    "npu_moe_gating_top_k.k-group": Case(
        breaks=[lambda: gating(k_group=0, group_count=4), lambda: gating(k_group=5, group_count=4)],
        edges=[lambda: gating(k_group=1, group_count=4), lambda: gating(k_group=4, group_count=4)],
    ),
    "npu_moe_gating_top_k.group-count": Case(
        breaks=[lambda: gating(group_count=0), lambda: gating(group_count=3)], edges=[lambda: gating(group_count=1), lambda: gating(group_count=4)]
    ),
    "npu_moe_gating_top_k.group-size": case(lambda: gating(group_count=8, k_group=4), lambda: gating((2, 24), group_count=8, k_group=4)),
    "npu_moe_gating_top_k.aligned-experts": case(
        lambda: gating((1, 260), group_count=65, k_group=2), lambda: gating((1, 256), group_count=64, k_group=2)
    ),
    "npu_moe_gating_top_k.group-select-mode": case(lambda: gating(group_select_mode=2), lambda: gating(group_select_mode=1)),
    "npu_moe_gating_top_k.renorm": case(lambda: gating(renorm=1), lambda: gating(renorm=0)),
    "npu_moe_gating_top_k.norm-type": case(lambda: gating(norm_type=2), lambda: gating(norm_type=1)),
    "npu_moe_gating_top_k_softmax.rank": case(lambda: gating_softmax((16,)), lambda: gating_softmax((1, 2, 16))),
    "npu_moe_gating_top_k_softmax.dtype": case(lambda: gating_softmax(dtype=I32), lambda: gating_softmax(dtype=BF16)),
    "npu_moe_gating_top_k_softmax.k": Case(
        breaks=[lambda: gating_softmax(k=0), lambda: gating_softmax(k=17)], edges=[lambda: gating_softmax(k=1), lambda: gating_softmax(k=16)]
    ),
    "npu_moe_gating_top_k_softmax.most-k": case(lambda: gating_softmax((1, 2048), k=1025), lambda: gating_softmax((1, 2048), k=1024)),
    "npu_moe_gating_top_k_softmax.finished-dtype": case(
        lambda: gating_softmax(finished=(2,), finished_dtype=I32), lambda: gating_softmax(finished=(2,))
    ),
    "npu_moe_gating_top_k_softmax.finished-shape": case(lambda: gating_softmax(finished=(1,)), lambda: gating_softmax(finished=(2,))),
    "npu_moe_update_expert.threshold-dtype": case(lambda: update(BF16), update),
    "npu_moe_update_expert.mask-order": case(lambda: update(mask=(False, True)), lambda: update(mask=(True, True))),
    "npu_moe_update_expert.world-size": Case(
        breaks=[lambda: update(world=1), lambda: update(world=769)], edges=[lambda: update(world=2), lambda: update(world=768)]
    ),
    "npu_moe_re_routing.dtype": case(lambda: re_routing(dtype=F32), lambda: re_routing(dtype=I8)),
    "npu_moe_re_routing.size": case(lambda: re_routing(16384), lambda: re_routing(16383)),
    "npu_moe_init_routing_v2.shape": case(lambda: routing((3, 8)), routing),
    "npu_moe_init_routing_v2.dtype": case(lambda: routing(dtype=I32), lambda: routing(dtype=I8), lambda: routing(dtype=F32)),
    "npu_moe_init_routing_v2.expert-idx-dtype": Case(
        breaks=[lambda: routing(ids_dtype=I64), lambda: routing(ids_dtype=F32)], edges=[routing]
    ),
    "npu_moe_init_routing_v2.expert-ids": Case(
        breaks=[lambda: routing(ids=((0, 2), (1, 0))), lambda: routing(ids=((0, -1), (1, 0)))], edges=[lambda: routing(ids=((0, 1), (1, 1)))]
    ),
    "npu_moe_init_routing_v2.scale-dtype": case(lambda: routing(scale=(2,), scale_dtype=BF16), lambda: routing(scale=(2,))),
    "npu_moe_init_routing_v2.scale-shape": Case(
        breaks=[lambda: routing(scale=(2, 8)), lambda: routing(scale=(2,), quant_mode=1)],
        edges=[lambda: routing(scale=(2,)), lambda: routing(scale=(2, 8), quant_mode=1)],
    ),
    "npu_moe_init_routing_v2.offset": case(lambda: routing(offset=(2,)), routing),
    "npu_moe_init_routing_v2.active-num": case(lambda: routing(active_num=-2), lambda: routing(active_num=-1)),
    "npu_moe_init_routing_v2.expert-num": case(lambda: routing(expert_num=0), lambda: routing(expert_num=2)),
    "npu_moe_init_routing_v2.most-experts": Case(
        breaks=[lambda: routing(expert_num=10241), lambda: routing(expert_num=5121, expert_tokens_num_type=2)],
        edges=[lambda: routing(expert_num=10240), lambda: routing(expert_num=5120, expert_tokens_num_type=2)],
    ),
    "npu_moe_init_routing_v2.drop-pad-mode": case(lambda: routing(drop_pad_mode=1), lambda: routing(drop_pad_mode=0)),
    "npu_moe_init_routing_v2.tokens-num-type": case(
        lambda: routing(expert_tokens_num_type=0), lambda: routing(expert_tokens_num_type=1), lambda: routing(expert_tokens_num_type=2)
    ),
    "npu_moe_init_routing_v2.tokens-num-flag": case(lambda: routing(expert_tokens_num_flag=False), routing),
    "npu_moe_init_routing_v2.quant-mode": case(lambda: routing(quant_mode=0), lambda: routing(quant_mode=1)),
    "npu_moe_init_routing_v2.int8-quant-mode": case(lambda: routing(dtype=I8, quant_mode=1), lambda: routing(dtype=I8)),
    "npu_moe_init_routing_v2.expert-range": Case(
        breaks=[lambda: routing(active_expert_range=[-1, 2]), lambda: routing(active_expert_range=[0, 3])],
        edges=[lambda: routing(active_expert_range=[1, 2])],
    ),
    "npu_moe_init_routing_v2.row-idx-type": case(lambda: routing(row_idx_type=2), lambda: routing(row_idx_type=1)),
    "npu_moe_token_permute.rank": case(lambda: permute((2, 1, 8)), permute),
    "npu_moe_token_permute.dtype": Case(
        breaks=[lambda: permute(dtype=I8), lambda: permute(dtype=I32)], edges=[lambda: permute(dtype=F16), lambda: permute(dtype=F32)]
    ),
    "npu_moe_token_permute.indices-shape": case(lambda: permute(ids=((0,),)), lambda: permute(ids=(0, 1))),
    "npu_moe_token_permute.indices-dtype": case(lambda: permute(ids_dtype=F32), lambda: permute(ids_dtype=I32)),
    "npu_moe_token_permute.indices-count": case(
        lambda: permute((16777215, 1), F16, ids=many(16777215)), lambda: permute((1 << 16, 1), F16, ids=many(1 << 16))
    ),
    "npu_moe_token_permute.indices": Case(
        breaks=[lambda: permute(ids=((0, -1), (1, 0))), lambda: permute(ids=((0, 16777215), (1, 0)))],
        edges=[lambda: permute(ids=((0, 16777214), (1, 0)))],
    ),
    "npu_moe_token_permute.top-k": case(
        lambda: permute((1, 8), ids=(tuple(range(513)),)), lambda: permute((1, 8), ids=(tuple(range(512)),))
    ),
    "npu_moe_token_permute.padded-mode": case(lambda: permute(padded=True), permute),
    "npu_moe_token_unpermute.rank": case(lambda: unpermute((4, 1, 8)), unpermute),
    "npu_moe_token_unpermute.dtype": case(lambda: unpermute(dtype=I32), lambda: unpermute(dtype=F32), lambda: unpermute(dtype=F16)),
    "npu_moe_token_unpermute.indices-dtype": case(lambda: unpermute(order_dtype=I64), unpermute),
    "npu_moe_token_unpermute.indices-rank": case(lambda: unpermute(order=((0, 3), (1, 2))), unpermute),
    "npu_moe_token_unpermute.sorted-indices": Case(
        breaks=[lambda: unpermute(order=(0, 4, 1, 2)), lambda: unpermute(order=(0, -1, 1, 2))], edges=[unpermute]
    ),
    "npu_moe_token_unpermute.each-row-once": case(
        lambda: unpermute(order=(0, 3, 1, 1)),
        unpermute,
        lambda: unpermute(order=(0, 3, 1, 1), probs=torch.tensor([[1, 1], [1, 0]], dtype=BF16).npu()),
    ),
    "npu_moe_token_unpermute.probs-dtype": case(lambda: unpermute(probs=(2, 2), probs_dtype=I32), lambda: unpermute(probs=(2, 2), probs_dtype=F32)),
    "npu_moe_token_unpermute.probs-shape": case(lambda: unpermute(probs=(2, 1)), lambda: unpermute(probs=(2, 2)), lambda: unpermute(probs=(4, 1))),
    "npu_moe_token_unpermute.top-k": case(
        lambda: unpermute((513, 8), order=tuple(range(513)), probs=(1, 513)), lambda: unpermute((512, 8), order=tuple(range(512)), probs=(1, 512))
    ),
    "npu_moe_token_unpermute.padded-mode": case(lambda: unpermute(padded=True), unpermute),
}  # fmt: skip
