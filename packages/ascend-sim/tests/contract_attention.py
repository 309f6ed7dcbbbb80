# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of both versions of fused attention."""

from functools import partial

import torch
import torch_npu
from ascend_sim.contracts import contract
from contract_cases import Case, case

FIRST, SECOND = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
NAMES = {  # of the second version, where they differ
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
}
COMPRESSED = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def send(operator, **arguments):
    """Call an operator with the first version's names; tensors are sent to the device as they lie in memory."""
    if operator == SECOND:
        arguments = {NAMES.get(name, name): value for name, value in arguments.items()}
    sent = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and not value.is_contiguous():
            copy = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="npu")
            sent[name] = copy.copy_(value.npu())
        else:
            sent[name] = value.npu() if isinstance(value, torch.Tensor) else value
    return getattr(torch_npu, operator)(**sent)


def paged(operator, heads=4, kv_heads=2, size=64, block=128, dtype=torch.bfloat16, tokens=(1, 1), **changes):
    """Two requests over a paged cache of four blocks, in TND layout."""
    cache = zeros(4, block, kv_heads * size, dtype=dtype)
    ends = torch.tensor(tokens).cumsum(0).tolist()
    return send(operator, **{
        "query": zeros(sum(tokens), heads, size, dtype=dtype), "key": cache, "value": cache, "atten_mask": COMPRESSED,
        "block_table": TABLE, "input_layout": "TND", "block_size": block, "actual_seq_lengths": ends,
        "actual_seq_lengths_kv": [block + 1, 5], "num_heads": heads, "num_key_value_heads": kv_heads, "sparse_mode": 3, **changes,
    })  # fmt: skip


def dense(operator, heads=4, size=128, value_size=None, queries=(1, 2), keys=(1, 2), **changes):
    """Requests without a cache, in TND layout, without a mask."""
    return send(operator, **{
        "query": zeros(sum(queries), heads, size), "key": zeros(sum(keys), heads, size),
        "value": zeros(sum(keys), heads, value_size or size), "input_layout": "TND", "num_heads": heads, "sparse_mode": 0,
        "actual_seq_lengths": torch.tensor(queries).cumsum(0).tolist(), "actual_seq_lengths_kv": torch.tensor(keys).cumsum(0).tolist(),
        **changes,
    })  # fmt: skip


def batched(operator, heads=2, size=32, tokens=3, batch=2, dtype=torch.bfloat16, layout="BNSD", **changes):
    """Requests of one length, in a layout with a batch dimension."""
    shapes = {"BSND": lambda n: (batch, n, heads, size), "BSH": lambda n: (batch, n, heads * size)}
    shape = shapes.get(layout.partition("_")[0], lambda n: (batch, heads, n, size))
    keys = zeros(*shape(5 if batch < 9 else 1), dtype=dtype)
    return send(operator, **{
        "query": zeros(*shape(tokens), dtype=dtype), "key": keys, "value": keys, "input_layout": layout, "num_heads": heads, **changes,
    })  # fmt: skip


def absorbed(operator, heads=32, kv_heads=1, tokens=1, block=128, layout="BSND", dtype=torch.bfloat16, **changes):
    """Latent attention in the absorbed form, two requests over a paged cache."""

    def query(size):
        given = zeros(2, tokens, heads, size, dtype=dtype)
        return {"BSND": given, "TND": given.flatten(0, 1), "NTD_TND": given.flatten(0, 1).transpose(0, 1).contiguous()}[
            layout
        ]

    latents, rope = zeros(4, block, kv_heads * 512, dtype=dtype), zeros(4, block, kv_heads * 64, dtype=dtype)
    masked = {"sparse_mode": 3, "atten_mask": COMPRESSED} if tokens > 1 else {}
    return send(operator, **{
        "query": query(512), "query_rope": query(64), "key": latents, "value": latents, "key_rope": rope, "block_table": TABLE,
        "block_size": block, "input_layout": layout, "num_heads": heads, "num_key_value_heads": kv_heads,
        "actual_seq_lengths": None if layout == "BSND" else [tokens, 2 * tokens], "actual_seq_lengths_kv": [20, 25], **masked, **changes,
    })  # fmt: skip


def plain(operator, heads=4, size=128, value_size=128, rope=64, key_rope=None, **changes):
    """Latent attention in the plain form, two requests."""
    return send(operator, **{
        "query": zeros(3, heads, size), "query_rope": zeros(3, heads, rope), "key": zeros(3, heads, size),
        "key_rope": zeros(3, heads, key_rope or rope), "value": zeros(3, heads, value_size), "atten_mask": COMPRESSED, "sparse_mode": 3,
        "input_layout": "TND", "num_heads": heads, "actual_seq_lengths": [1, 3], "actual_seq_lengths_kv": [1, 3], **changes,
    })  # fmt: skip


def general(call, most):
    """Of any layout. `call`: one of the functions above by name; `most`: the numbers of the contract."""
    return {
        "dtype": case(call(batched, dtype=torch.float32), call(batched, dtype=torch.float16)),
        "one-dtype": case(call(paged, key=zeros(4, 128, 128, dtype=torch.float16)), call(paged)),
        "contiguous": case(call(paged, query=zeros(2, 8, 64)[:, :4]), call(paged)),
        "layout-name": case(call(paged, input_layout="TDN"), call(paged)),
        "layout": case(call(batched, layout="BNSD_BNSD", input_layout="BSND_BNSD"), call(batched, layout="BSND")),
        "bnsd-bsnd": case(call(batched, layout="BNSD_BSND", tokens=1), call(batched, layout="BNSD_BSND", tokens=2)),
        "head-multiple": case(call(paged, num_key_value_heads=3), call(paged)),
        "head-ratio": case(
            call(paged, heads=most("head-ratio") + 1, kv_heads=1), call(paged, heads=most("head-ratio"), kv_heads=1)
        ),
        "heads": case(call(dense, heads=most("heads") + 1), call(dense, heads=most("heads"))),
        "batch": case(
            call(batched, batch=most("batch") + 1, heads=1, size=16, tokens=1),
            call(batched, batch=most("batch"), heads=1, size=16, tokens=1),
        ),
        "head-size": case(call(batched, size=most("head-size") + 16), call(batched, size=most("head-size"))),
        "alignment": case(call(batched, size=24), call(batched, size=16)),
        "width": case(
            call(batched, layout="BSND", heads=128, size=512), call(batched, layout="BSND", heads=195, size=336)
        ),
        "inner-precise": case(call(paged, inner_precise=4), call(paged, inner_precise=3)),
        "sparse-mode": case(call(paged, sparse_mode=9), call(paged, sparse_mode=4)),
        "mask-dtype": case(
            call(paged, atten_mask=COMPRESSED.bfloat16()),
            call(paged, atten_mask=COMPRESSED.bool()),
            call(paged, atten_mask=COMPRESSED.byte()),
        ),
        "mask-contiguous": case(call(paged, atten_mask=COMPRESSED.t().contiguous().t()), call(paged)),
        "mask-needed": case(call(paged, atten_mask=None), call(paged)),
        "mask-shape": case(
            call(paged, atten_mask=COMPRESSED[:64, :64].contiguous()), call(paged, atten_mask=COMPRESSED[None, None])
        ),
        "mask-content": case(call(paged, atten_mask=1 - COMPRESSED), call(paged)),
        "whole-mask-needed": case(
            call(batched, sparse_mode=1), call(batched, sparse_mode=1, atten_mask=torch.zeros(1, 1, 3, 5).bool())
        ),
        "band": case(
            call(paged, sparse_mode=4, pre_tokens=3, next_tokens=-4),
            call(paged, sparse_mode=4, pre_tokens=3, next_tokens=-3),
        ),
        "band-batched": case(
            call(batched, tokens=1, sparse_mode=4, atten_mask=COMPRESSED),
            call(batched, tokens=2, sparse_mode=4, atten_mask=COMPRESSED),
            call(paged, sparse_mode=4),
        ),
    }


def packed(call, most):
    """Of TND layout, without rotary parts."""
    causal = {"sparse_mode": 3, "atten_mask": COMPRESSED}
    many = {"heads": 1, "size": 64, "keys": (1,)}
    return {
        "causal-lengths": case(
            call(dense, queries=(1, 2), keys=(2, 1), **causal), call(dense, queries=(1, 2), keys=(1, 2), **causal)
        ),
        "tnd-lengths": case(call(paged, actual_seq_lengths=None), call(paged)),
        "cumulative": case(call(paged, actual_seq_lengths=[2, 1]), call(paged, actual_seq_lengths=[2, 2])),
        "last-length": case(call(paged, actual_seq_lengths=[1, 1]), call(paged, actual_seq_lengths=[0, 2], actual_seq_lengths_kv=[5, 5])),
        "tnd-mask": case(call(dense, atten_mask=COMPRESSED), call(dense)),
        "tnd-dtype": case(call(paged, dtype=torch.float16), call(paged)),
        "tnd-head-size": Case(
            breaks=[call(paged, size=size) for size in (32, 80, 96, 160, 288)],
            edges=[call(paged, size=size) for size in (64, 128, 192, 256)],
        ),
        "tnd-value-size": Case(
            breaks=[call(dense, value_size=64), call(dense, size=192, value_size=64)],
            edges=[call(dense), call(dense, size=192, value_size=128)],
        ),
        "tnd-tokens": case(
            call(dense, queries=(most("tnd-tokens") + 1,), **many), call(dense, queries=(most("tnd-tokens"),), **many)
        ),
        "paged-lengths": case(call(paged, actual_seq_lengths_kv=None), call(paged)),
        "block-table-dtype": case(call(paged, block_table=TABLE.long()), call(paged)),
        "block-table-rank": case(call(paged, block_table=TABLE.flatten()), call(paged)),
        "block-table-rows": case(call(paged, block_table=TABLE[:1]), call(paged)),
        "block-table-columns": case(
            call(paged, actual_seq_lengths_kv=[257, 5]), call(paged, actual_seq_lengths_kv=[256, 5])
        ),
        "block-size": Case(
            breaks=[call(paged, block=block, tokens=(1, 2)) for block in (16, 64, 192, 640, 1024)],
            edges=[call(paged, block=block, tokens=(1, 2)) for block in (128, 256, 384, 512)],
        ),
        "block-alignment": case(call(paged, block=24), call(paged, block=16)),
        "paged-layout": case(
            call(batched, heads=2, size=64, layout="BSND", tokens=1, key=zeros(4, 2, 128, 64), value=zeros(4, 2, 128, 64),
                 block_table=TABLE, block_size=128, actual_seq_lengths_kv=[5, 6]),
            call(paged, key=zeros(4, 2, 128, 64), value=zeros(4, 2, 128, 64)),
        ),
        "paged-width": case(
            call(paged, heads=256, kv_heads=256, size=256), call(paged, heads=255, kv_heads=255, size=256)
        ),
    }  # fmt: skip


def latent(call, layouts, heads, second):
    """Of both forms of latent attention."""
    return {
        "rope-pair": case(call(dense, query_rope=zeros(3, 4, 64)), call(plain)),
        "rope-sizes": case(call(plain, key_rope=32), call(plain)),
        "rope-size": case(call(plain, rope=32), call(plain)),
        "rope-head-size": case(call(plain, size=192), call(plain, size=128), call(absorbed)),
        "latent-layout": case(call(absorbed, layout="NTD_TND" if second else "TND"), *(call(absorbed, layout=one) for one in layouts)),
        "latent-heads": Case(
            breaks=[call(absorbed, heads=one) for one in (33, 256, *(() if second else (16,)))],
            edges=[call(absorbed, heads=one) for one in heads],
        ),
        "latent-kv-heads": case(call(absorbed, kv_heads=2), call(absorbed)),
        "latent-paged": case(
            call(absorbed, key=zeros(2, 5, 1, 512), value=zeros(2, 5, 1, 512), key_rope=zeros(2, 5, 1, 64), block_table=None,
                 actual_seq_lengths_kv=None),
            call(absorbed),
        ),
        "latent-block-size": Case(
            breaks=[call(absorbed, block=block) for block in (32, 64, 256)],
            edges=[call(absorbed, block=block) for block in (16, 128)],
        ),
        "latent-queries": case(call(absorbed, tokens=17), call(absorbed, tokens=16)),
        "latent-mask": Case(
            breaks=[call(absorbed, sparse_mode=3, atten_mask=COMPRESSED), call(absorbed, tokens=2, sparse_mode=0, atten_mask=None)],
            edges=[call(absorbed), call(absorbed, tokens=2)],
        ),
        "plain-layout": case(
            call(batched, heads=2, size=128, query_rope=zeros(2, 2, 3, 64), key_rope=zeros(2, 2, 5, 64)), call(plain)
        ),
        "plain-paged": case(
            call(paged, heads=4, kv_heads=4, size=128, tokens=(1, 2), query_rope=zeros(3, 4, 64), key_rope=zeros(4, 128, 256)), call(plain)
        ),
        "plain-value-size": case(call(plain, value_size=64), call(plain)),
    }  # fmt: skip


def of(operator):
    """All cases of a version, by id."""
    rules = {rule.id.partition(".")[2]: rule for rule in contract(operator).rules}
    second = operator == SECOND

    def call(function, **changes):
        return partial(function, operator, **changes)

    cases = general(call, lambda name: rules[name].most) | packed(call, lambda name: rules[name].most)
    cases |= latent(call, ("BSND", "TND") if second else ("BSND",), rules["latent-heads"].allowed, second)
    if second:
        sink, most = zeros(4), rules["lengths"].most
        one = {"heads": 1, "size": 64}
        cases |= {
            "lengths": case(call(dense, queries=(1,) * (most + 1), keys=(1,) * (most + 1), **one), call(dense, queries=(1,) * most, keys=(1,) * most, **one)),
            "sink-shape": case(call(paged, learnable_sink=zeros(5)), call(paged, learnable_sink=sink)),
            "sink-dtype": case(call(paged, learnable_sink=sink.float()), call(paged, learnable_sink=sink)),
            "sink-layout": case(call(batched, learnable_sink=zeros(2)), call(paged, learnable_sink=sink)),
            "sink-value-size": case(call(paged, size=192, learnable_sink=sink), call(paged, size=128, learnable_sink=sink)),
        }  # fmt: skip
    return {f"{operator}.{name}": one for name, one in cases.items()}


CASES = of(FIRST) | of(SECOND)
