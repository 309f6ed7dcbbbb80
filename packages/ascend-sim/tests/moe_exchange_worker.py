# SPDX-License-Identifier: Apache-2.0
"""One rank of the processes that test_moe_exchange.py starts: tokens sent to their experts and back, against one process.

Every rank knows every rank's tokens and choices, so each can compute by itself what must arrive and return.
"""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch_npu
from ascend_sim.counters import counting
from sim_bounds import assert_close, assert_quantised, bound, gamma
from sim_memory import is_unwritten

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
STRICT = torch.ops.ascend_sim.strict()
NPU = torch.device("npu", RANK)
H = 64
DTYPES = (torch.bfloat16, torch.float16) if STRICT else (torch.float32,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    batches: list[int]  # tokens of each rank
    experts: int
    k: int
    routing: str = "random"
    active: list[int] | None = None  # tokens of each rank that take part
    pairs: bool = False  # a mask of pairs

    @property
    def local(self) -> int:
        return self.experts // WORLD


def cases() -> list[Case]:
    even, ragged = [5] * WORLD, [3 + rank for rank in range(WORLD)]
    return [
        Case(name="random", batches=even, experts=4 * WORLD, k=3),
        Case(name="one expert a rank", batches=even, experts=WORLD, k=1),
        Case(name="top-k is all experts", batches=even, experts=WORLD, k=WORLD),
        Case(name="all to one expert", batches=even, experts=2 * WORLD, k=1, routing="last"),
        Case(name="all at home", batches=even, experts=2 * WORLD, k=2, routing="home"),
        Case(name="one token", batches=[1] * WORLD, experts=8, k=4),
        Case(name="ragged", batches=ragged, experts=2 * WORLD, k=2),
        Case(name="padding", batches=even, experts=8, k=2, active=[rank % 3 + 1 for rank in range(WORLD)]),
        Case(name="a rank without tokens", batches=even, experts=8, k=2, active=[0] + [4] * (WORLD - 1)),
        Case(name="no tokens at all", batches=even, experts=8, k=2, active=[0] * WORLD),
        Case(name="masked pairs", batches=even, experts=8, k=3, pairs=True),
    ]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a rank has: x [BS, H], ids and weights [BS, K], mask [BS, K]."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor


def tokens_of(case: Case, rank: int, dtype: torch.dtype) -> Tokens:
    generator = torch.Generator().manual_seed(100 * rank + len(case.name))
    batch = case.batches[rank]
    ids = torch.rand(batch, case.experts, generator=generator).argsort(1)[:, : case.k]
    if case.routing == "last":
        ids.fill_(case.experts - 1)
    if case.routing == "home":
        ids = torch.arange(case.k).expand(batch, -1) + rank * case.local
    mask = torch.ones(batch, case.k, dtype=torch.bool)
    if case.active is not None:
        mask[case.active[rank] :] = False
    if case.pairs:
        mask = torch.rand(batch, case.k, generator=generator) < 0.6
    x = torch.randn(batch, H, generator=generator).to(dtype)
    return Tokens(x, ids.int(), torch.rand(batch, case.k, generator=generator), mask)


def arrivals(case: Case, everyone: list[Tokens], rank: int) -> list[list[tuple[int, int, int]]]:
    """(rank, token, k) of the rows of each expert of `rank`, in order."""
    return [
        [
            (source, t, j)
            for source, tokens in enumerate(everyone)
            for t, j in tokens.mask.nonzero().tolist()
            if tokens.ids[t, j] == expert
        ]
        for expert in range(rank * case.local, (rank + 1) * case.local)
    ]


def other_rows(case: Case, tokens: Tokens) -> int:
    """How many of this rank's choices lie on other ranks."""
    return int((tokens.mask & (tokens.ids // case.local != RANK)).sum())


def common(case: Case, name: str) -> dict[str, object]:
    return {
        "group_ep": name,
        "ep_world_size": WORLD,
        "ep_rank_id": RANK,
        "moe_expert_num": case.experts,
        "global_bs": 0 if len(set(case.batches)) == 1 else max(case.batches) * WORLD,
    }


def masked(case: Case, mask: torch.Tensor) -> torch.Tensor | None:
    if case.pairs:
        return mask.to(NPU)
    return None if case.active is None else mask[:, 0].contiguous().to(NPU)


def dispatch(case: Case, tokens: Tokens, name: str, **options: object) -> list[torch.Tensor]:
    arguments = {"x": tokens.x.to(NPU), "expert_ids": tokens.ids.to(NPU), **common(case, name), **options}
    arguments["x_active_mask"] = masked(case, tokens.mask)
    results = torch_npu.npu_moe_distribute_dispatch_v2(**arguments)
    meta = torch_npu.npu_moe_distribute_dispatch_v2(
        **{name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    )
    assert [(r.shape, r.dtype) for r in results] == [(m.shape, m.dtype) for m in meta]
    assert all(r.device == NPU for r in results)
    return list(results)


def check_rows(
    case: Case, everyone: list[Tokens], results: list[torch.Tensor], scales: torch.Tensor | None, quant: bool
):
    """What arrived is what was sent, expert by expert."""
    experts = arrivals(case, everyone, RANK)
    rows = [row for expert in experts for row in expert]
    expand_x, dynamic, assist, numbers, ends, _, expand_scales = (r.cpu() for r in results)
    assert numbers.tolist() == [len(expert) for expert in experts]
    assert (
        ends[: WORLD * case.local].tolist()
        == torch.tensor([sum(row[0] == source for row in expert) for expert in experts for source in range(WORLD)])
        .cumsum(0)
        .tolist()
    )
    for i, (source, t, j) in enumerate(rows):
        x = everyone[source].x[t]
        assert assist[i * 128 : i * 128 + 3].tolist() == [source, t, j]
        assert not expand_scales.numel() or expand_scales[i] == everyone[source].weights[t, j]
        if not quant:
            assert torch.equal(expand_x[i], x)
            continue
        exact = x.double() * (1 if scales is None else scales[everyone[source].ids[t, j]].double())
        assert_quantised(expand_x[i : i + 1], dynamic[i : i + 1], exact[None], gamma(1) * exact[None].abs())
    assert is_unwritten(expand_x[len(rows) :])


def there_and_back(case: Case, name: str, group: dist.ProcessGroup) -> None:
    for dtype in DTYPES:
        everyone = [tokens_of(case, rank, dtype) for rank in range(WORLD)]
        mine = everyone[RANK]
        with counting() as work:
            results = dispatch(case, mine, name)
        check_rows(case, everyone, results, None, quant=False)
        row = H * dtype.itemsize
        sent = work.delta.collectives["npu_moe_distribute_dispatch_v2", group.group_desc]
        assert (sent.calls, sent.bytes) == (1, other_rows(case, mine) * row)
        assert len(work.delta.collectives) == 1
        # Expert e multiplies by e + 1.
        factors = torch.repeat_interleave(torch.arange(case.local) + RANK * case.local + 1, results[3].cpu())
        done = results[0].clone()
        done[: len(factors)] *= factors.to(NPU)[:, None].to(dtype)
        shared = torch.randn(len(mine.x), H).to(dtype)
        with counting() as work:
            out = torch_npu.npu_moe_distribute_combine_v2(
                expand_x=done, expert_ids=mine.ids.to(NPU), assist_info_for_combine=results[2], ep_send_counts=results[4],
                expert_scales=mine.weights.to(NPU), x_active_mask=masked(case, mine.mask), shared_expert_x=shared.to(NPU),
                tp_send_counts=results[5], **common(case, name),
            )  # fmt: skip
        back = work.delta.collectives["npu_moe_distribute_combine_v2", group.group_desc]
        foreign = sum(source != RANK for expert in arrivals(case, everyone, RANK) for source, _, _ in expert)
        assert (back.calls, back.bytes) == (1, foreign * row)
        # A row was stored after its factor; k weighted rows and the shared one are summed in float32 and stored.
        weight = (mine.weights.double() * (mine.ids.double() + 1) * mine.mask).sum(1, keepdim=True)
        rows = mine.x.double() * weight
        expected = rows + shared.double()
        allowed = bound(rows, dtype, steps=0) + bound(
            expected, dtype, steps=2 * case.k + 1, magnitude=rows.abs() + shared.double().abs()
        )
        assert (out.shape, out.dtype, out.device) == (mine.x.shape, dtype, NPU)
        assert_close(out, expected, allowed)


def quantised(case: Case, name: str, group: dist.ProcessGroup) -> None:
    everyone = [tokens_of(case, rank, DTYPES[0]) for rank in range(WORLD)]
    scales = torch.rand(case.experts, H, generator=torch.Generator().manual_seed(1)) + 0.5
    for given in (None, scales):
        with counting() as work:
            results = dispatch(
                case, everyone[RANK], name, quant_mode=2, scales=None if given is None else given.to(NPU)
            )
        check_rows(case, everyone, results, given, quant=True)
        sent = work.delta.collectives["npu_moe_distribute_dispatch_v2", group.group_desc]
        assert sent.bytes == other_rows(case, everyone[RANK]) * (H + 4)


def product_forms(case: Case, name: str) -> None:
    """A2 hands over expert_scales, A3 a TP group of one; the numbers of tokens cumulative."""
    everyone = [tokens_of(case, rank, DTYPES[0]) for rank in range(WORLD)]
    results = dispatch(case, everyone[RANK], name, expert_scales=everyone[RANK].weights.to(NPU))
    check_rows(case, everyone, results, None, quant=False)
    assert results[6].numel() == results[0].size(0)
    results = dispatch(
        case, everyone[RANK], name, group_tp=name, tp_world_size=1, tp_rank_id=0, expert_token_nums_type=0
    )
    experts = arrivals(case, everyone, RANK)
    assert results[3].tolist() == torch.tensor([len(expert) for expert in experts]).cumsum(0).tolist()


def rejections(case: Case, name: str) -> None:
    mine = tokens_of(case, RANK, DTYPES[0])
    refused = [
        ("no HCCL communicator is named 'hccl_nobody_0-1'", {"group_ep": "hccl_nobody_0-1"}),
        ("no HCCL communicator is named 'nobody'", {"group_ep": "nobody"}),
        (
            f"ep_world_size and ep_rank_id must be those of group_ep, {WORLD} and {RANK}",
            {"ep_rank_id": (RANK + 1) % WORLD},
        ),
        ("moe_expert_num must be a multiple of ep_world_size", {"moe_expert_num": case.experts + 1}),
        ("quant_mode must be 0 .* or 2", {"quant_mode": 1}),
        ("shared_expert_rank_num must be 0", {"shared_expert_rank_num": 1}),
        (r"tp_world_size must be 0 or 1", {"tp_world_size": 2}),
        (r"global_bs must be 0 or max\(BS\) \* ep_world_size", {"global_bs": 1}),
        (r"expert_ids must lie in \[0, moe_expert_num", {"expert_ids": (mine.ids + case.experts).to(NPU)}),
    ]
    twice = mine.ids.clone()
    twice[:, 1] = twice[:, 0]
    refused.append(("must not name an expert twice", {"expert_ids": twice.to(NPU)}))
    if STRICT:
        refused += [
            ("x must be float16 or bfloat16, got Float", {"x": mine.x.float().to(NPU)}),
            ("H must be a multiple of 32", {"x": mine.x[:, :48].to(NPU)}),
            (
                "every true must come before every false",
                {"x_active_mask": (torch.arange(len(mine.x)) > 0).to(NPU)},
            ),
        ]
    for message, changes in refused:
        arguments = {"x": mine.x.to(NPU), "expert_ids": mine.ids.to(NPU), **common(case, name)}
        with pytest.raises(RuntimeError, match=f"npu_moe_distribute_dispatch_v2: .*{message}"):
            torch_npu.npu_moe_distribute_dispatch_v2(**(arguments | changes))
    dist.barrier()


def mistakes_fail_on_every_rank(case: Case, name: str) -> None:
    """What one rank does wrong must not leave the others waiting."""
    mine = tokens_of(case, RANK, DTYPES[0])
    extra = 1 if RANK == 0 else 0
    x = torch.cat((mine.x, mine.x[:extra])).to(NPU)
    ids = torch.cat((mine.ids, mine.ids[:extra])).to(NPU)
    with pytest.raises(RuntimeError, match=r"global_bs must be max.* where BS differs from rank to rank, got 0 with"):
        torch_npu.npu_moe_distribute_dispatch_v2(x=x, expert_ids=ids, **common(case, name))
    results = dispatch(case, mine, name)
    mask = torch.arange(len(mine.x)) < len(mine.x) - extra
    with pytest.raises(RuntimeError, match="expert_ids and x_active_mask must be those of the dispatch"):
        torch_npu.npu_moe_distribute_combine_v2(
            expand_x=results[0], expert_ids=mine.ids.to(NPU), assist_info_for_combine=results[2], ep_send_counts=results[4],
            expert_scales=mine.weights.to(NPU), x_active_mask=mask.to(NPU), **common(case, name),
        )  # fmt: skip
    dist.barrier()


def main(init: str) -> None:
    torch.npu.set_device(NPU)
    dist.init_process_group("hccl", init_method=init, rank=RANK, world_size=WORLD, timeout=timedelta(minutes=10))
    group = dist.new_group(list(range(WORLD)), group_desc="experts", timeout=timedelta(minutes=10))
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(RANK)
    todo = cases()
    for case in todo:
        there_and_back(case, name, group)
    for case in (todo[0], todo[6], todo[8]):
        quantised(case, name, group)
    product_forms(todo[0], name)
    rejections(todo[0], name)
    mistakes_fail_on_every_rank(todo[0], name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
