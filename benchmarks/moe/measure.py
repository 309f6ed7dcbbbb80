# SPDX-License-Identifier: Apache-2.0
"""One rank of the benchmark: layers on the simulated NPU, and what its counters say of them.

Legend: T tokens of all ranks, n tokens that a rank starts with, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from ascend_comm import CommGroup, Solo, TorchGroup
from ascend_moe import (
    CommMethod,
    FloatExperts,
    MoeEnv,
    RoutingSpec,
    W8A8Experts,
    experts_forward,
    make_comm,
    quantise_weights,
    select_experts,
)
from ascend_sim.counters import counting
from torch import Tensor

WORLD = 8
TIMEOUT = timedelta(seconds=60)
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 64, 32, 4
PER_RANK = 32  # tokens
SPEC = RoutingSpec(top_k=TOP_K, scoring="softmax", renormalise=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A layer to measure: `dp` ranks with tokens of their own, each with `tp` that share them."""

    method: CommMethod
    dp: int
    tp: int
    quantised: bool

    @property
    def ranks(self) -> int:
        return self.dp * self.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one rank did for one layer: bytes sent, calls of NPU kernels, of all device operators, of collectives."""

    sent: int
    kernels: int
    operators: int
    collectives: int


def logits_of(tokens: int, seed: int, skew: float = 0.0) -> Tensor:
    """Float32 `[T, E]`: normal, plus `skew` times the logarithm of a Zipf share of each expert, in a fixed random order."""
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1))
    return logits - skew * torch.log1p(order.float())


class Rank:
    """This process: its device, its groups of every size."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.device = torch.device("npu", rank)
        generator = torch.Generator().manual_seed(0)
        self.w13 = torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE, generator=generator) / HIDDEN**0.5
        self.w2 = torch.randn(EXPERTS, INTERMEDIATE, HIDDEN, generator=generator) / INTERMEDIATE**0.5
        self._ep = {size: self._group(size) for size in (2, 4, 8)}
        self._mc2 = {size: self._group(size) for size in (2, 4, 8)}
        dist.barrier(device_ids=[rank])

    def _group(self, size: int) -> CommGroup | None:
        made = dist.new_group(list(range(size)), timeout=TIMEOUT)
        return TorchGroup(made) if self.rank < size else None

    def env(self, setup: Setup, num_slots: int) -> MoeEnv:
        """Groups of ranks that are all data parallel or all tensor parallel."""
        everyone, alone = self._ep[setup.ranks], Solo(self.rank)
        return MoeEnv(
            ep=everyone,
            dp=everyone if setup.dp > 1 else alone,
            tp=everyone if setup.tp > 1 else alone,
            mc2=self._mc2[setup.ranks],
            num_slots=num_slots,
        )

    def experts(self, held: list[int], quantised: bool) -> FloatExperts | W8A8Experts:
        """The experts `held` in bfloat16 or int8."""
        w13, w2 = self.w13[held], self.w2[held]
        if not quantised:
            return FloatExperts(w13=w13.bfloat16().to(self.device), w2=w2.bfloat16().to(self.device))
        (w13, w13_scale), (w2, w2_scale) = quantise_weights(w13), quantise_weights(w2)
        parts = (w13, w13_scale, w2, w2_scale.bfloat16())
        return W8A8Experts(
            **dict(zip(("w13", "w13_scale", "w2", "w2_scale"), (p.to(self.device) for p in parts), strict=True))
        )

    def own(self, setup: Setup, x: Tensor) -> Tensor:
        """The tokens that this rank starts with."""
        return x.chunk(setup.dp)[self.rank // setup.tp].to(self.device)


def count_work(rank: Rank, setup: Setup) -> Work | None:
    """One layer, counted after one that was not."""
    if rank.rank >= setup.ranks:
        return None
    env = rank.env(setup, EXPERTS)
    held = list(range(rank.rank * env.slots_per_rank, (rank.rank + 1) * env.slots_per_rank))
    experts, comm = rank.experts(held, setup.quantised), make_comm(setup.method, env)
    tokens = PER_RANK * setup.ranks
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    x, logits = rank.own(setup, x), rank.own(setup, logits_of(tokens, seed=3))
    for _ in range(2):
        with counting() as work:
            output = experts_forward(x, logits, spec=SPEC, experts=experts, comm=comm)
            if not comm.output_is_reduced:
                env.tp.all_reduce(output.hidden)
    counted = work.delta
    return Work(
        sent=counted.bytes,
        kernels=sum(count.calls for name, count in counted.operators.items() if name.startswith("npu::")),
        operators=counted.calls,
        collectives=sum(count.calls for count in counted.collectives.values()),
    )


def load_of(rank: Rank, ranks: int, slots: list[int], table: Tensor | None, skew: float, seed: int) -> int | None:
    """Tokens that this rank's experts get, of skewed traffic, where slot s holds expert `slots[s]`."""
    if rank.rank >= ranks:
        return None
    setup = Setup(method=CommMethod.ALL_TO_ALL_V, dp=ranks, tp=1, quantised=False)
    env = rank.env(setup, len(slots))
    held = slots[rank.rank * env.slots_per_rank : (rank.rank + 1) * env.slots_per_rank]
    logits = logits_of(512 * ranks, seed, skew)
    x = torch.zeros(len(logits), HIDDEN).bfloat16()
    output = experts_forward(
        rank.own(setup, x),
        rank.own(setup, logits),
        spec=SPEC,
        experts=rank.experts(held, quantised=False),
        comm=make_comm(setup.method, env),
        routing_table=None if table is None else table.to(rank.device),
    )
    return int(output.load.sum())


def chosen(tokens: int, seed: int, skew: float = 0.0) -> Tensor:
    """The experts of all tokens, `[T, K]`."""
    return select_experts(logits_of(tokens, seed, skew), SPEC)[1]


def serve(rank: int, store: str, jobs: list[Callable[[Rank], Any]], results: Any) -> None:
    """Do all jobs on one rank and hand back (rank, list of results)."""
    torch.set_num_threads(1)
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    here = Rank(rank)
    results.put((rank, [job(here) for job in jobs]))
    dist.barrier(device_ids=[rank])
    dist.destroy_process_group()
    results.close()
    results.join_thread()
    os._exit(0)
