# SPDX-License-Identifier: Apache-2.0
"""Fused kernels in processes on the NPU, and prefetch, against the dense product."""

from functools import partial

import ascend_linear as al
import linear_cases
import quant_cases
import shard_cases
import torch
from ascend_comm import GroupConfig, Topology
from ascend_sim.counters import counting
from linear_bounds import assert_close, gamma
from linear_cases import CASES, IN, OUT, arrangement, cut, real_data, run
from spawned import with_groups
from torch import Tensor
from torch.nn.functional import linear


def product(x: Tensor, weight: Tensor, bias: Tensor | None, ranks: int) -> tuple[Tensor, Tensor]:
    """x @ weight.t() + bias in float64, and how far a sum over ranks in x's type may be from it.

    Each rank's part is a sum of products in float32, stored, and stored again with the bias; then each addition of two ranks' parts is stored.
    """

    dtype, added = x.dtype, torch.zeros(()) if bias is None else bias.double()
    x, weight = x.double(), weight.double()
    parts = [linear(one, two) for one, two in zip(x.chunk(ranks, 1), weight.chunk(ranks, 1), strict=True)]
    stored = sum(part.abs() for part in parts) + added.abs()
    computed = linear(x.abs(), weight.abs()) + added.abs()
    return sum(parts) + added, gamma(ranks + 2, dtype) * stored + 2 * gamma(IN + 2) * computed


def close(actual: Tensor, expected: Tensor, allowed: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert_close(actual, expected, allowed)


def kernels_run(work) -> set[str]:
    return {name.removeprefix("npu::") for name in work.delta.operators if name.startswith("npu::npu_mm_")}


def matmul_allreduce(groups, rank: int, dtype: torch.dtype) -> None:
    """Every combination of flags; the fused kernel runs where it can, in steps with prompts, and nowhere else."""
    env = al.LinearEnv(tp=groups["tp"], enable_matmul_allreduce=True)
    for tokens, (has_bias, skip, returns) in CASES:
        x, weight, bias = (tensor.to(dtype) for tensor in real_data(tokens))
        bias = bias if has_bias else None
        expected, allowed = product(x, weight, None if skip else bias, env.tp.world_size)
        ask = partial(run, weight=weight, bias=bias, skip_bias_add=skip, return_bias=returns)
        for prefill in (True, False):
            state = al.plan_step(tokens, env, prefill=prefill)
            for given, parallel in ((cut(x, 1, env.tp), True), (x, False), (x.view(1, tokens, IN), False)):
                with counting() as work:
                    actual = ask(al.MatmulAllreduceRowParallelOp(env), given, state=state, input_is_parallel=parallel)
                close(actual.view(tokens, OUT), expected, allowed, dtype)
                fuses = prefill and tokens and env.tp.world_size > 1
                assert kernels_run(work) == ({"npu_mm_all_reduce_base"} if fuses else set())
        ask = partial(ask, state=al.StepState(prefill=True))
        part = ask(al.MatmulAllreduceRowParallelOp(env), x, input_is_parallel=False, reduce_results=False)
        close(env.tp.all_reduce(part.float()).to(dtype), expected, allowed, dtype)
        own = al.MatmulAllreduceRowParallelOp(env)
        close(ask(own, x, input_is_parallel=False, gemm=lambda x, w, b: linear(x, w, b)), expected, allowed, dtype)


def matmul_reduce_scatter(groups, rank: int, dtype: torch.dtype) -> None:
    """FlashComm1 with product and reduce-scatter in one kernel, where it is active."""
    env = al.LinearEnv(tp=groups["tp"], enable_flashcomm1=True, enable_matmul_reduce_scatter=True)
    for tokens, (has_bias, skip, returns) in CASES:
        x, weight, bias = (tensor.to(dtype) for tensor in real_data(tokens))
        bias = bias if has_bias else None
        expected, allowed = product(x, weight, None if skip else bias, env.tp.world_size)
        ask = partial(run, weight=weight, bias=bias, skip_bias_add=skip, return_bias=returns)
        for threshold in (0, 1000):
            state = al.plan_step(tokens, env, threshold=threshold)
            for given, parallel in ((cut(x, 1, env.tp), True), (x, False)):
                with counting() as work:
                    actual = ask(al.SequenceRowParallelOp(env), given, state=state, input_is_parallel=parallel)
                assert kernels_run(work) == ({"npu_mm_reduce_scatter_base"} if state.flashcomm1 else set())
                rows = len(actual) if state.flashcomm1 else 0
                own = slice(env.tp.rank_in_group * rows, (env.tp.rank_in_group + 1) * rows) if rows else slice(None)
                close(actual[: len(expected[own])], expected[own], allowed[own], dtype)


def prefetches(rank: int) -> None:
    """The kernel is asked for the right number of bytes, under the token limit only; finishing waits and computes on."""
    prefetcher = al.WeightPrefetcher(al.PrefetchConfig(ratios={"o": 0.5, "qkv": 1.0}, max_tokens=4))
    x, weight = torch.ones(4, 8), torch.ones(16, 8)
    with counting() as work:
        assert prefetcher.start("o", weight, x)
        assert prefetcher.start("qkv", weight, x)
        assert not prefetcher.start("down", weight, x)
        assert not prefetcher.start("o", weight, torch.ones(5, 8))
        prefetcher.finish()
        prefetcher.finish()
    assert work.delta.operators["npu::npu_prefetch"].calls == 2
    assert linear(x, weight).sum() == 4 * 16 * 8


def fused(rank: int, world: int, dtype: torch.dtype) -> None:
    for case in (matmul_allreduce, matmul_reduce_scatter):
        with_groups(partial(case, dtype=dtype), arrangement(world, 1), rank)


def strict_2(rank: int) -> None:
    fused(rank, 2, torch.bfloat16)
    quant_cases.as_on_hardware(rank, 2)
    prefetches(rank)


def strict_4(rank: int) -> None:
    fused(rank, 4, torch.bfloat16)
    quant_cases.as_on_hardware(rank, 4)
    linear_cases.world_of_4(rank)
    shard_cases.world_of_4(rank)
    config = GroupConfig(
        topology=Topology(4, tensor_parallel=4), mc2=False, layer_sharding=("o_proj",), weight_shards=1
    )
    with_groups(shard_cases.a_missing_wait_shows, config, rank)


def relaxed_8(rank: int) -> None:
    """Ops in float64 as over gloo, fused kernels and W8A8 in float32; all of TP or DP in eight."""
    with_groups(linear_cases.plain_ops, arrangement(8, 1), rank)
    with_groups(linear_cases.sequence_ops, arrangement(8, 1), rank)
    with_groups(partial(linear_cases.sequence_ops, dp_tokens=(3, 6, 1, 4)), arrangement(8, 4), rank)
    for k in (1, 2, 4):
        with_groups(linear_cases.flashcomm2, arrangement(8, 1, flashcomm2=k), rank)
    for k in (2, 4, 8):
        with_groups(linear_cases.mlp, arrangement(8, 8, mlp_tp=k), rank)
        with_groups(linear_cases.oproj, arrangement(8, 8, otp=k), rank)
    fused(rank, 8, torch.float32)
    quant_cases.exactly(rank, 8)
    topology = Topology(8, data_parallel=2, tensor_parallel=4)
    config = GroupConfig(topology=topology, parallel=("tp", "dp"), mc2=False, flashcomm2=2, layer_sharding=("o_proj",))
    with_groups(shard_cases.model_with_streamed_oproj, config, rank)
