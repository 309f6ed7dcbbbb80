# SPDX-License-Identifier: Apache-2.0
"""Layer sharding in processes: a small model whose o_proj weights are streamed, against one that has them all."""

import ascend_linear as al
import torch
from ascend_comm import GroupConfig, Solo, Topology
from linear_cases import activation, cut, data, equal, equal_chunk
from spawned import with_groups
from torch.nn.functional import linear

WIDTH, HEADS = 24, 48  # hidden size; heads * head dim, a multiple of every world size


def streams_any_window(groups, rank: int) -> None:
    """Every step length, in series with gaps that start where a later pipeline stage does, for three steps."""
    group = groups["shard_weight"]
    for layers in ((0, 1), (16, 17, 18, 19, 20), (3, 7, 11, 15, 19, 23, 27)):
        for step in range(len(layers) - 1):
            shard = al.LayerShard(group, prefetch_step=step)
            truth = {layer: data(0, layer, WIDTH, HEADS)[1] for layer in layers}
            kept = {}
            for layer in layers:
                weight = truth[layer].clone()
                kept[layer] = (shard.add(layer, weight), weight)
                assert shard.owner(layer) == layers.index(layer) % group.world_size
                if not shard.keeps(layer):
                    weight.fill_(torch.nan)  # it need not be loaded
            shard.start()
            held = sum(shard.keeps(layer) for layer in layers) + (step + 1 if group.world_size > 1 else 0)
            assert shard.memory_bytes == held * truth[layers[0]].nbytes
            for layer, (_, weight) in kept.items():
                assert weight.numel() == (truth[layer].numel() if shard.keeps(layer) else 0)
            for _ in range(3):
                for layer in layers:
                    shard.reach(layer)
                    shard.reach(layer)
                    equal(kept[layer][0].get(), truth[layer])
                    equal(kept[layer][0].get(), truth[layer])
            shard.reach(layers[0])  # an aborted step
            shard.start()
            for layer in layers:
                shard.reach(layer)
                equal(shard.wait(layer), truth[layer])
                op = al.ShardedCPRowParallelOp(al.LinearEnv(tp=Solo()))
                op.update_attrs(al.LinearParams(weight=kept[layer][1], streamed=kept[layer][0], return_bias=False))
                x = data(3, layer, WIDTH, HEADS)[0]
                equal(op.apply(x), linear(x, truth[layer]))


class _Forgetful:
    """A group whose broadcasts nobody waits for."""

    def __init__(self, group) -> None:
        self.group, self.world_size, self.rank_in_group, self.left = group, group.world_size, group.rank_in_group, []

    def broadcast_async(self, tensor, source):
        self.left.append(self.group.broadcast_async(tensor, source))
        return self

    def wait(self) -> None:
        pass


def a_missing_wait_shows(groups, rank: int) -> None:
    """With lazy streams, as on hardware that is slow: what reads a weight too early does not read the weight."""
    group = _Forgetful(groups["shard_weight"])
    layers = (0, 1, 2)
    shard = al.LayerShard(group, prefetch_step=0)
    truth = {layer: data(0, layer, WIDTH, HEADS)[1] for layer in layers}
    kept = {layer: shard.add(layer, truth[layer].clone()) for layer in layers}
    shard.start()
    for layer in layers:
        shard.reach(layer)
        early = kept[layer].get().clone()
        for pending in group.left:
            pending.wait()
        group.left.clear()
        assert torch.equal(early, truth[layer]) == shard.keeps(layer)
        equal(kept[layer].get(), truth[layer])


def model_with_streamed_oproj(groups, rank: int) -> None:
    """FlashComm2 with o-shard, beside FlashComm1 and without: qkv starts the broadcast, o_proj computes with it."""
    dp = groups["dp"]
    names = {name: groups.get(name) for name in ("flashcomm2_odp", "flashcomm2_otp")}
    layers = (4, 5, 6, 7)
    for enable, step in ((False, 0), (True, 1), (True, 2)):
        shard = al.LayerShard(groups["shard_weight"], prefetch_step=step)
        env = al.LinearEnv(
            tp=groups["tp"],
            dp_rank=dp.rank_in_group,
            enable_flashcomm1=enable,
            layer_sharding=("o_proj",),
            o_shard=shard,
            **names,
        )
        ops, weights = {}, {}
        for layer in layers:
            prefix = f"model.layers.{layer}.self_attn"
            qkv = al.get_parallel_op("column", f"{prefix}.qkv_proj", env)
            o_proj = al.get_parallel_op("row", f"{prefix}.o_proj", env)
            assert isinstance(qkv.op, al.Flashcomm2OshardQKVParallelOp)
            assert isinstance(o_proj.op, al.Flashcomm2OProjRowParallelOp)
            weights[layer] = (data(0, layer, WIDTH, HEADS)[1], *data(0, layer, HEADS, WIDTH)[1:])
            qkv.op.update_attrs(al.LinearParams(weight=weights[layer][0].chunk(qkv.tp_size)[qkv.tp_rank]))
            own = weights[layer][1].chunk(o_proj.tp_size, 1)[o_proj.tp_rank].contiguous()
            params = al.LinearParams(weight=own, bias=weights[layer][2], streamed=shard.add(layer, own))
            o_proj.op.update_attrs(params)
            ops[layer] = (qkv.op, o_proj.op)
        shard.start()
        for tokens in (5, 8, 1):  # DP ranks differ in their tokens
            mine = tokens + dp.rank_in_group
            check_model(ops, weights, env, data(mine, dp.rank_in_group, WIDTH, HEADS)[0], mine)


def check_model(ops, weights, env: al.LinearEnv, x: torch.Tensor, tokens: int) -> None:
    state = al.plan_step(tokens, env, threshold=0)
    padded = torch.nn.functional.pad(x, (0, 0, 0, state.pad_size))
    hidden, dense = cut(padded, 0, env.tp) if state.flashcomm1 else x, x
    for layer, (qkv, o_proj) in ops.items():
        heads, up = activation(linear(dense, weights[layer][0])), activation(qkv.apply(hidden, state)[0])
        equal(up, cut(heads, 1, env.tp))
        dense = activation(linear(heads, weights[layer][1], weights[layer][2]))
        hidden = activation(o_proj.apply(up, state)[0])
        equal_chunk(hidden, dense, state, env.tp)


def world_of_4(rank: int) -> None:
    whole = GroupConfig(topology=Topology(4), parallel=("tp", "dp"), mc2=False, layer_sharding=("o_proj",))
    pairs = Topology(4, pipeline_parallel=2, tensor_parallel=2)
    for topology, shards in ((Topology(4, tensor_parallel=4), 1), (pairs, 1)):
        config = GroupConfig(topology=topology, mc2=False, layer_sharding=("o_proj",), weight_shards=shards)
        with_groups(streams_any_window, config, rank)
    with_groups(streams_any_window, whole, rank)  # a group of one rank: nothing is streamed
    for dp, k in ((1, 1), (1, 2), (2, 1)):
        topology = Topology(4, data_parallel=dp, tensor_parallel=4 // dp)
        config = GroupConfig(
            topology=topology, parallel=("tp", "dp"), mc2=False, flashcomm2=k, layer_sharding=("o_proj",)
        )
        with_groups(model_with_streamed_oproj, config, rank)
