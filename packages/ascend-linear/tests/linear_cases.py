# SPDX-License-Identifier: Apache-2.0
"""What each rank does: an op on its shard and its tokens, against the dense product, which every rank knows by seed."""

from functools import partial
from itertools import product

import ascend_linear as al
import pytest
import torch
from ascend_comm import GroupConfig, Topology
from spawned import with_groups
from torch import Tensor
from torch.nn.functional import linear

IN, OUT = 48, 96  # multiples of every world size in the tests
FLAGS = ((True, False, True), (True, False, False), (True, True, True), (True, True, False), (False, True, True))
CASES = [(5, flags) for flags in FLAGS] + [(tokens, FLAGS[0]) for tokens in (0, 1, 8, 13)]
"""Token counts, each with whether there is a bias, `skip_bias_add` and `return_bias`."""


def real_data(tokens: int, seed: int = 0, in_: int = IN, out: int = OUT) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, in], weight [out, in], bias [out] in float64, normally distributed, on the default device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = [(tokens, in_), (out, in_), (out,)]
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(torch.get_default_device())
        for shape in shapes
    )
    return x, weight, bias


def data(*args: int, **options: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same as whole numbers: every product and every sum of them, in any order, is exact in float64."""
    x, weight, bias = ((2 * tensor).round() for tensor in real_data(*args, **options))
    return x, weight, bias


def activation(x: Tensor) -> Tensor:
    """Not linear, and small whole numbers again: -3 to 3."""
    return x.remainder(7) - 3


def cut(x: Tensor, dim: int, group) -> Tensor:
    return x.chunk(group.world_size, dim)[group.rank_in_group].contiguous()


def run(op: al.CustomLinearOp, x: Tensor, weight: Tensor, bias: Tensor | None = None, state=None, **flags) -> Tensor:
    """The op on its shard of the weight; checks the form of the result. A skipped bias is returned but not added."""
    column = isinstance(op, al.CustomColumnParallelOp)
    shard = cut(weight, 0 if column else 1, op.group) if op.tp_size > 1 else weight
    own_bias = cut(bias, 0, op.group) if column and bias is not None else bias
    op.update_attrs(al.LinearParams(weight=shard, bias=own_bias, **flags))
    before = x.clone()
    result = op.apply(x, state)
    assert torch.equal(x.nan_to_num(), before.nan_to_num()), "the op has overwritten its input"
    if not flags.get("return_bias", True):
        assert isinstance(result, Tensor)
        return result
    output, returned = result
    assert returned is (own_bias if flags.get("skip_bias_add") else None)
    return output


def equal(actual: Tensor, expected: Tensor) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(actual, expected), "not the dense product"  # NaN from padding fails here too


def plain_ops(groups, rank: int) -> None:
    """Column, row and replicated ops, and the two without communication, for every combination of bias flags."""
    env = al.LinearEnv(tp=groups["tp"])
    for tokens, (has_bias, skip, returns) in CASES:
        x, weight, bias = data(tokens)
        bias = bias if has_bias else None
        expected = linear(x, weight, None if skip else bias)
        ask = partial(run, weight=weight, bias=bias, skip_bias_add=skip, return_bias=returns)
        equal(ask(al.CustomColumnParallelOp(env), x), cut(expected, 1, env.tp))
        equal(ask(al.CustomColumnParallelOp(env), x, gather_output=True), expected)
        equal(ask(al.CustomRowParallelOp(env), cut(x, 1, env.tp)), expected)
        equal(ask(al.CustomRowParallelOp(env), x, input_is_parallel=False), expected)
        part = ask(al.CustomRowParallelOp(env), x, input_is_parallel=False, reduce_results=False)
        assert not tokens or not torch.equal(part, expected)
        equal(env.tp.all_reduce(part), expected)
        for whole in (al.CustomReplicatedOp, al.ShardedCPColumnParallelOp, al.ShardedCPRowParallelOp):
            equal(ask(whole(env), x), expected)
        equal(ask(al.CustomRowParallelOp(env), x.view(1, tokens, IN), input_is_parallel=False), expected[None])


def sequence_ops(groups, rank: int, dp_tokens: tuple[int, ...] | None = None) -> None:
    """FlashComm1, active and not. With `dp_tokens` the DP ranks have different token counts."""
    dp = groups.get("dp")
    env = al.LinearEnv(tp=groups["tp"], enable_flashcomm1=True, dp_rank=dp.rank_in_group if dp else 0)
    cases = [(dp_tokens[env.dp_rank], flags) for flags in FLAGS] if dp_tokens else CASES
    for (tokens, (has_bias, skip, returns)), threshold in product(cases, (0, 1000)):
        x, weight, bias = data(tokens, seed=env.dp_rank)
        bias = bias if has_bias else None
        expected = linear(x, weight, None if skip else bias)
        state = al.plan_step(tokens, env, threshold=threshold, dp_tokens=dp_tokens)
        assert state.flashcomm1 is (threshold < max(dp_tokens or (tokens,)))
        ask = partial(run, weight=weight, bias=bias, state=state, skip_bias_add=skip, return_bias=returns)
        padded = torch.cat([x, torch.full((state.pad_size, IN), torch.nan)]) if state.pad_size else x
        mine = cut(padded, 0, env.tp) if state.flashcomm1 else x
        equal(ask(al.SequenceColumnParallelOp(env), mine), cut(expected, 1, env.tp))
        equal(ask(al.SequenceColumnParallelOp(env), mine, gather_output=True), expected)
        for args in ((cut(x, 1, env.tp), True), (x, False)):
            actual = ask(al.SequenceRowParallelOp(env), args[0], input_is_parallel=args[1])
            equal_chunk(actual, expected, state, env.tp)


def padded_by_caller(groups, rank: int) -> None:
    """o_proj under DSA-CP gets padded rows and adds none."""
    env = al.LinearEnv(tp=groups["tp"], enable_flashcomm1=True, enable_dsa_cp=True)
    x, weight, bias = data(5)
    state = al.plan_step(5, env, threshold=0)
    padded = torch.nn.functional.pad(x, (0, 0, 0, state.pad_size))
    op = al.SequenceRowParallelOp(env, prefix="model.layers.0.self_attn.o_proj")
    equal_chunk(run(op, cut(padded, 1, env.tp), weight, bias, state), linear(x, weight, bias), state, env.tp)


def equal_chunk(actual: Tensor, expected: Tensor, state: al.StepState, tp) -> None:
    """`actual` is all of the result, or under FlashComm1 this rank's chunk of it (padding may hold anything)."""
    if not state.flashcomm1:
        return equal(actual, expected)
    rows = (len(expected) + state.pad_size) // tp.world_size
    assert len(actual) == rows
    mine = expected[tp.rank_in_group * rows :][:rows]
    return equal(actual[: len(mine)], mine)


def flashcomm2(groups, rank: int) -> None:
    """FlashComm2's o_proj, beside FlashComm1 and without."""
    names = {name: groups.get(name) for name in ("flashcomm2_odp", "flashcomm2_otp")}
    for enable, (tokens, (has_bias, skip, parallel)) in product((False, True), CASES):
        env = al.LinearEnv(tp=groups["tp"], enable_flashcomm1=enable, **names)
        assert al.Flashcomm2OProjRowParallelOp(env).tp_size == env.flashcomm2_size
        state = al.plan_step(tokens, env, threshold=0)
        x, weight, bias = data(tokens)
        own = bias if has_bias else None
        given = cut(x, 1, env.tp) if parallel else x
        op = al.Flashcomm2OProjRowParallelOp(env)
        actual = run(op, given, weight, own, state, skip_bias_add=skip, input_is_parallel=parallel)
        equal_chunk(actual, linear(x, weight, None if skip else own), state, env.tp)


def mlp(groups, rank: int) -> None:
    """A dense MLP over mlp-TP: each DP rank gets the product of its own tokens. One shard of each weight per rank."""
    dp, k = groups["dp"].rank_in_group, groups["mlp_tp"].world_size
    env = al.LinearEnv(tp=groups["tp"], mlp_tp=groups["mlp_tp"], dp_rank=dp)
    for tokens, (has_bias, skip, returns) in CASES:
        x, up, up_bias = data(tokens, seed=dp)
        up, up_bias = data(0)[1:]
        _, down, down_bias = data(0, 1, OUT, IN)
        state = al.StepState(dp_tokens=(tokens,) * groups["dp"].world_size)
        flags = {"skip_bias_add": skip, "return_bias": returns}
        hidden = run(al.MLPColumnParallelOp(env), x, up, up_bias if has_bias else None, state, **flags)
        assert hidden.shape == (k * tokens, OUT // k)
        row_bias = down_bias if has_bias else None
        y = run(al.MLPRowParallelOp(env), activation(hidden), down, row_bias, state, **flags)
        added = has_bias and not skip
        dense = linear(activation(linear(x, up, up_bias if added else None)), down, down_bias if added else None)
        equal(y, dense)
        gathered = run(al.MLPColumnParallelOp(env), x, up, None, state, gather_output=True)
        equal(gathered.chunk(k)[env.mlp_tp.rank_in_group], linear(x, up))
        whole = env.mlp_tp.all_gather(activation(hidden), 1)
        again = run(al.MLPRowParallelOp(env), whole, down, row_bias, state, input_is_parallel=False, **flags)
        equal(again, dense)


def oproj(groups, rank: int) -> None:
    """o_proj over oproj-TP: each DP rank gets the product of its own tokens."""
    dp = groups["dp"].rank_in_group
    env = al.LinearEnv(tp=groups["tp"], otp=groups["otp"], dp_rank=dp)
    weight, bias = data(0)[1:]
    for tokens, (has_bias, skip, returns) in CASES:
        x, own = data(tokens, seed=dp)[0], bias if has_bias else None
        y = run(al.OProjRowParallelOp(env), x, weight, own, skip_bias_add=skip, return_bias=returns)
        equal(y, linear(x, weight, None if skip else own))


def uneven_tokens_are_refused(groups, rank: int) -> None:
    """DP ranks of one group that differ in their tokens: an error on all of them, before anything is exchanged."""
    dp = groups["dp"]
    counts = tuple(range(3, 3 + dp.world_size))
    state = al.StepState(dp_tokens=counts)
    env = al.LinearEnv(tp=groups["tp"], mlp_tp=dp, otp=dp, dp_rank=dp.rank_in_group)
    x = data(counts[env.dp_rank])[0]
    for kind in (al.MLPColumnParallelOp, al.OProjRowParallelOp):
        with pytest.raises(ValueError, match="needs equal counts on its ranks"):
            run(kind(env), x, *data(0)[1:], state)
    with pytest.raises(ValueError, match="needs equal counts on its ranks"):
        run(al.MLPRowParallelOp(env), data(dp.world_size)[0], *data(0)[1:], state, input_is_parallel=False)


def fused_kernels_need_hccl(groups, rank: int) -> None:
    """Over gloo the error says so, on all ranks, before anything is exchanged."""
    x, weight, _ = data(4)
    flags = {"enable_flashcomm1": True, "enable_matmul_reduce_scatter": True}
    cases = (
        (al.MatmulAllreduceRowParallelOp, {"enable_matmul_allreduce": True}, al.StepState(prefill=True)),
        (al.SequenceRowParallelOp, flags, al.StepState(flashcomm1=True)),
    )
    for kind, options, state in cases:
        op = kind(al.LinearEnv(tp=groups["tp"], **options))
        with pytest.raises(RuntimeError, match="only an HCCL group has a communicator name, and this one runs over"):
            run(op, cut(x, 1, op.group), weight, state=state)


def arrangement(world: int, dp: int, **options: int) -> GroupConfig:
    topology = Topology(world, data_parallel=dp, tensor_parallel=world // dp)
    return GroupConfig(topology=topology, parallel=("tp", "dp"), mc2=False, **options)


def world_of_4(rank: int) -> None:
    with_groups(plain_ops, arrangement(4, 1), rank)
    with_groups(sequence_ops, arrangement(4, 1), rank)
    with_groups(padded_by_caller, arrangement(4, 1), rank)
    with_groups(partial(sequence_ops, dp_tokens=(3, 6)), arrangement(4, 2), rank)
    for k in (1, 2):
        with_groups(flashcomm2, arrangement(4, 1, flashcomm2=k), rank)
        with_groups(mlp, arrangement(4, 2, mlp_tp=k), rank)
    for k in (2, 4):
        with_groups(mlp, arrangement(4, 4, mlp_tp=k), rank)
        with_groups(oproj, arrangement(4, 4, otp=k), rank)
    with_groups(uneven_tokens_are_refused, arrangement(4, 4), rank)


def world_of_2(rank: int) -> None:
    with_groups(plain_ops, arrangement(2, 1), rank)
    with_groups(sequence_ops, arrangement(2, 1), rank)
    with_groups(fused_kernels_need_hccl, arrangement(2, 1), rank)
    with_groups(flashcomm2, arrangement(2, 1, flashcomm2=1), rank)
    for k in (1, 2):
        with_groups(mlp, arrangement(2, 2, mlp_tp=k), rank)
        with_groups(oproj, arrangement(2, 2, otp=k), rank)
