# SPDX-License-Identifier: Apache-2.0
"""Collectives, and the kernels that exchange data, over two ranks: as ascend-comm, ascend-linear and ascend-moe call them.

Both ranks build the inputs of both, so that each knows what it should receive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from ascend_comm import CommGroup
from ascend_linear import kernels
from ascend_moe import CommMethod, MoeEnv, Soc, make_comm
from torch import Tensor

from vllm_ascend.probe.cases_linear import int8, positive
from vllm_ascend.probe.expected import FLOAT32, Case, Expected, Result, exactly, random, unit

__all__ = ["RANKS", "Ranks", "cases"]

RANKS = 2
BF16 = torch.bfloat16
ROWS, IN, OUT = 32, 512, 256
TOKENS, TOP_K, SLOTS, HIDDEN = 8, 4, 16, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What a case of two ranks needs of one of them.

    Attributes:
        group: of both ranks.
        mc2: a second communicator of both.
        soc: the chip.
    """

    group: CommGroup
    mc2: CommGroup
    soc: Soc

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.group.rank_in_group


def cases() -> Iterator[Callable[[Ranks], Case | Result]]:
    """What builds each case, or says why it is none of this chip."""
    yield _all_reduce
    yield _all_gather
    yield _reduce_scatter
    yield _broadcast
    yield _all_to_all
    yield _mm_all_reduce
    yield _mm_reduce_scatter
    yield _mm_reduce_scatter_int8
    yield _mc2_dispatch
    yield _mc2_combine


def _each(*shape: int, seed: int = 0) -> list[Tensor]:
    """Other numbers on each rank."""
    return [random(*shape, seed=seed + 10 * rank) for rank in range(RANKS)]


def _collective(
    ranks: Ranks, name: str, shape: str, given: Sequence[Tensor], call: Callable[[Tensor], Tensor], expected: Expected
) -> Case:
    return Case(
        kernel=f"ascend_comm.{name}", shape=shape, inputs=[given[ranks.rank]], call=lambda x: [call(x)], expected=lambda x: [expected],
    )  # fmt: skip


def _summed(given: Sequence[Tensor]) -> Expected:
    value = sum((x.double() for x in given), torch.zeros(given[0].shape, dtype=torch.float64))
    return Expected(value=value, allowed=value.abs() * unit(BF16))


def _all_reduce(ranks: Ranks) -> Case:
    given = _each(ROWS, IN)
    return _collective(ranks, "all_reduce", "32 x 512", given, ranks.group.all_reduce, _summed(given))


def _all_gather(ranks: Ranks) -> Case:
    given = _each(ROWS, IN)
    return _collective(
        ranks, "all_gather", "32 x 512 of each", given, lambda x: ranks.group.all_gather(x, 0), exactly(torch.cat(given))
    )  # fmt: skip


def _reduce_scatter(ranks: Ranks) -> Case:
    given = _each(ROWS, IN)
    own = _summed([x.chunk(RANKS)[ranks.rank] for x in given])
    return _collective(
        ranks, "reduce_scatter", "32 x 512 into 16 each", given, lambda x: ranks.group.reduce_scatter(x, 0), own
    )


def _broadcast(ranks: Ranks) -> Case:
    given = _each(ROWS, IN)
    return _collective(
        ranks, "broadcast", "32 x 512 of rank 1", given, lambda x: ranks.group.broadcast(x, 1), exactly(given[1])
    )


def _all_to_all(ranks: Ranks) -> Case:
    """Uneven splits, one of them empty."""
    sent = ((5, 27), (0, 32))  # rows that each rank sends to each
    given = _each(ROWS, IN)
    received = [splits[ranks.rank] for splits in sent]
    value = torch.cat([torch.split(x, list(splits))[ranks.rank] for x, splits in zip(given, sent, strict=True)])
    return _collective(
        ranks, "all_to_all", "32 rows, 5 and 27, 0 and 32", given,
        lambda x: ranks.group.all_to_all(x, received, list(sent[ranks.rank])), exactly(value),
    )  # fmt: skip


def _products(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum over ranks of their products, and by how much the kernel may be off: each rank's product may be rounded before the sum."""
    parts = [x.double() @ weight.double() for x, weight in zip(xs, weights, strict=True)]
    sizes = [x.double().abs() @ weight.double().abs() for x, weight in zip(xs, weights, strict=True)]
    value = torch.stack(parts).sum(0)
    allowed = torch.stack(parts).abs().sum(0) * unit(BF16) + value.abs() * unit(BF16)
    return value, allowed + torch.stack(sizes).sum(0) * (IN + 4) * FLOAT32


def _mm_all_reduce(ranks: Ranks) -> Case | Result:
    kernel, shape = "ascend_linear.mm_all_reduce", f"{ROWS} x {IN} x {OUT} of each rank"
    if ranks.soc is not Soc.A2:
        return Result(kernel=kernel, shape=shape, verdict="not run", detail="the operator is for Atlas A2")
    xs, weights = _each(ROWS, IN), _each(IN, OUT, seed=1)
    value, allowed = _products(xs, weights)
    name = ranks.group.comm_name()
    return Case(
        kernel=kernel, shape=shape, inputs=(xs[ranks.rank], weights[ranks.rank]),
        call=lambda x, weight: [kernels.mm_all_reduce(x, weight, name)], expected=lambda *_: [Expected(value=value, allowed=allowed)],
    )  # fmt: skip


def _mm_reduce_scatter(ranks: Ranks) -> Case:
    xs, weights = _each(ROWS, IN), _each(IN, OUT, seed=1)
    value, allowed = (whole.chunk(RANKS)[ranks.rank] for whole in _products(xs, weights))
    name = ranks.group.comm_name()
    return Case(
        kernel="ascend_linear.mm_reduce_scatter", shape=f"{ROWS} x {IN} x {OUT} of each rank", inputs=(xs[ranks.rank], weights[ranks.rank]),
        call=lambda x, weight: [kernels.mm_reduce_scatter(x, weight, name, RANKS)],
        expected=lambda *_: [Expected(value=value, allowed=allowed)],
    )  # fmt: skip


def _mm_reduce_scatter_int8(ranks: Ranks) -> Case:
    each = [
        (int8(ROWS, IN, seed=rank), int8(IN, OUT, seed=10 + rank), positive(ROWS, 1, seed=rank), positive(1, OUT, seed=10 + rank))
        for rank in range(RANKS)
    ]  # fmt: skip
    parts = torch.stack([(x.long() @ weight.long()).double() * token * scale for x, weight, token, scale in each])
    value = parts.sum(0)
    allowed = parts.abs().sum(0) * (unit(BF16) + 6 * FLOAT32) + value.abs() * unit(BF16)
    own = Expected(value=value.chunk(RANKS)[ranks.rank], allowed=allowed.chunk(RANKS)[ranks.rank])
    name = ranks.group.comm_name()

    def call(x: Tensor, weight: Tensor, token: Tensor, scale: Tensor) -> list[Tensor]:
        return [
            kernels.mm_reduce_scatter(
                x, weight, name, RANKS, token_scale=token, weight_scale=scale, output_dtype=BF16
            )
        ]  # fmt: skip

    return Case(
        kernel="ascend_linear.mm_reduce_scatter", shape=f"int8, {ROWS} x {IN} x {OUT} of each rank", inputs=each[ranks.rank], call=call,
        expected=lambda *_: [own],
    )  # fmt: skip


def _tokens() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each rank the tokens, which have their number in column 0, weights and slots."""
    generator, given = torch.Generator().manual_seed(7), []
    for rank, x in enumerate(_each(TOKENS, HIDDEN)):
        x[:, 0] = torch.arange(TOKENS) + rank * TOKENS
        ids = torch.stack([torch.randperm(SLOTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
        given.append((x, torch.rand(TOKENS, TOP_K, generator=generator) + 0.1, ids.int()))
    return given


def _received(rank: int) -> tuple[Tensor, Tensor]:
    """The rows that the slots of a rank receive, in the order of slots and then of tokens, and how many each slot does."""
    given, per_rank = _tokens(), SLOTS // RANKS
    rows: list[Tensor] = []
    counts = []
    for slot in range(rank * per_rank, (rank + 1) * per_rank):
        mine = [x[(ids == slot).any(1)] for x, _, ids in given]
        rows += mine
        counts.append(sum(len(part) for part in mine))
    return torch.cat(rows), torch.tensor(counts)


def _mc2_dispatch(ranks: Ranks) -> Case:
    """In which order a slot receives its tokens is promised nowhere, so they are compared by their numbers."""
    comm = make_comm(CommMethod.MC2, _environment(ranks))
    rows, counts = _received(ranks.rank)

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> list[Tensor]:
        sent = comm.dispatcher.dispatch(x, weights, ids)
        slots = torch.arange(len(counts), device=x.device).repeat_interleave(sent.counts)[: len(rows)]
        order = (slots * RANKS * TOKENS + sent.rows[: len(rows), 0].long()).argsort()
        return [sent.rows[: len(rows)][order], sent.counts]

    return Case(
        kernel="ascend_moe.mc2_dispatch", shape=f"{TOKENS} tokens of each rank, {TOP_K} of {SLOTS} slots", inputs=_tokens()[ranks.rank], call=call,
        expected=lambda *_: [exactly(rows), exactly(counts)],
    )  # fmt: skip


def _mc2_combine(ranks: Ranks) -> Case:
    """Each slot multiplies by a power of two of its own."""
    comm = make_comm(CommMethod.MC2, _environment(ranks))
    per_rank = SLOTS // RANKS
    factors = 2.0 ** (torch.arange(SLOTS) % 4 - 2)

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> list[Tensor]:
        sent = comm.dispatcher.dispatch(x, weights, ids)
        own = factors[ranks.rank * per_rank :][:per_rank].to(x.device, x.dtype)
        rows = sent.rows
        by_row = own.repeat_interleave(sent.counts)
        rows[: len(by_row)] *= by_row[:, None]
        return [comm.dispatcher.combine(rows, sent)]

    def expected(x: Tensor, weights: Tensor, ids: Tensor) -> list[Expected]:
        parts = x.double()[:, None, :] * (weights.double() * factors[ids.long()].double())[..., None]
        allowed = parts.abs().sum(1) * (
            (TOP_K + 1) * unit(BF16) + TOP_K * FLOAT32
        )  # the sum may be rounded at each term
        return [Expected(value=parts.sum(1), allowed=allowed)]

    return Case(
        kernel="ascend_moe.mc2_combine", shape=f"{TOKENS} tokens of each rank, sums of {TOP_K} weighted rows", inputs=_tokens()[ranks.rank],
        call=call, expected=expected,
    )  # fmt: skip


def _environment(ranks: Ranks) -> MoeEnv:
    return MoeEnv(ep=ranks.group, dp=ranks.group, mc2=ranks.mc2, num_slots=SLOTS, soc=ranks.soc)
