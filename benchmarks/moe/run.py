# SPDX-License-Identifier: Apache-2.0
"""Bytes, kernels and load balance of ascend-moe's communication methods, counted on the simulated NPU.

Run: python benchmarks/moe/run.py [--json FILE] [--markdown FILE]

No figure here is a time. They depend on the program alone: every run on any machine gives the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import measure
import torch
from ascend_moe import CommMethod
from measure import EXPERTS, HIDDEN, PER_RANK, TOP_K, WORLD, Setup, Work, chosen
from rich.console import Console
from rich.table import Table

SIZES = (2, 4, 8)
SKEWS = (0.0, 0.5, 1.0)
REDUNDANT = 8
LIMIT = 300  # seconds
ELEMENT = 2  # bytes of bfloat16


def everywhere(jobs: list[Callable[[measure.Rank], Any]]) -> list[list[Any]]:
    """What each job gives on each rank, by job; a rank without part in it left out."""
    context = multiprocessing.get_context("fork")  # torch and torch_npu are imported once
    results = context.Queue()
    found: dict[int, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=measure.serve, args=(rank, f"{folder}/store", jobs, results))
            for rank in range(WORLD)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + LIMIT
        try:
            while len(found) < WORLD:
                if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
                    raise RuntimeError(f"only ranks {sorted(found)} of {WORLD} have answered; see their errors above")
                try:
                    rank, answers = results.get(timeout=1)
                except queue.Empty:
                    continue
                found[rank] = answers
        finally:
            for process in ranks:
                process.kill() if len(found) < WORLD else process.join(30)
    return [[found[rank][job] for rank in range(WORLD) if found[rank][job] is not None] for job in range(len(jobs))]


def owners_of(setup: Setup) -> list[list[int]]:
    """Of each token, the ranks of its experts."""
    return (chosen(PER_RANK * setup.ranks, seed=3) // (EXPERTS // setup.ranks)).tolist()


def least_bytes(setup: Setup) -> float:
    """Bytes that any method has to send in all, on average for a token.

    Tokens of their own (DP): a token goes once to each other rank that has one of its experts, and one sum comes back
    from each. Shared tokens (TP): all R ranks have the token and want its result. Each of the c ranks with one of its
    experts but one has to send its sum on, and R - 1 ranks have to be given the total.
    """
    tokens = PER_RANK * setup.ranks
    there = ELEMENT * HIDDEN if not setup.quantised else HIDDEN + 4
    back = ELEMENT * HIDDEN
    total = 0
    for token, row in enumerate(owners_of(setup)):
        ranks = set(row)
        if setup.dp > 1:
            total += len(ranks - {token // PER_RANK}) * (there + back)
        else:
            total += (len(ranks) - 1 + setup.ranks - 1) * back
    return total / tokens


def expected_bytes(setup: Setup) -> float:
    """Bytes that the method sends by its own rule, for a token."""
    ranks, tokens = setup.ranks, PER_RANK * setup.ranks
    row = ELEMENT * HIDDEN
    if setup.method is CommMethod.ALL_GATHER:
        if setup.dp > 1:  # gather hidden states and float32 logits, reduce-scatter sums
            return (ranks - 1) * (row + 4 * EXPERTS) + (ranks - 1) * row
        return 2 * (ranks - 1) * row  # all-reduce
    if setup.method is CommMethod.MC2:
        return bytes_by_expert(setup)
    # A token goes once to each rank with some of its experts, with ids and weights; ranks tell each other two numbers.
    there = (row if not setup.quantised else HIDDEN + 4) + 8 * TOP_K
    moved = sum(len(set(row) - {token // PER_RANK}) for token, row in enumerate(owners_of(setup)))
    sizes = 16 * ranks * (ranks - 1)
    gather = 0 if setup.dp > 1 else (ranks - 1) * row * tokens  # slices over TP
    return (moved * (there + row) + sizes + gather) / tokens


def bytes_by_expert(setup: Setup) -> float:
    """Bytes for a token where a row is sent for each expert on another rank, as MC2 and the usual all-to-all-v do."""
    ranks, row = setup.ranks, ELEMENT * HIDDEN
    moved = sum(sum(rank != token // PER_RANK for rank in row) for token, row in enumerate(owners_of(setup)))
    there = row if not setup.quantised else HIDDEN + 4
    gather = 0 if setup.dp > 1 else (ranks - 1) * row
    return moved * (there + row) / (PER_RANK * ranks) + gather


def traffic_table() -> tuple[Table, list[dict[str, Any]]]:
    """Bytes and kernels of each method."""
    setups = [
        Setup(method=method, dp=size if own else 1, tp=1 if own else size, quantised=quantised)
        for size, own, quantised, method in product(SIZES, (True, False), (False, True), CommMethod)
    ]
    table = Table(
        title=f"one layer: {EXPERTS} experts, top {TOP_K}, hidden {HIDDEN}, bfloat16, {PER_RANK} tokens a rank",
        title_justify="left",
        caption="bytes that all ranks send for a token; 'by rule': computed from the method's description; 'a row an expert': "
        "the usual all-to-all-v; kernels and operators of the busiest rank",
    )
    for heading in (
        "EP",
        "tokens",
        "experts",
        "method",
        "bytes",
        "least",
        "of least",
        "by rule",
        "a row an expert",
        "NPU kernels",
        "operators",
        "collectives",
    ):
        table.add_column(heading, justify="left" if heading in ("tokens", "experts", "method") else "right")
    records = []
    for setup, works in zip(
        setups, everywhere([partial(measure.count_work, setup=setup) for setup in setups]), strict=True
    ):
        record = traffic_record(setup, works)
        records.append(record)
        usual = record["by_expert"]
        table.add_row(
            str(setup.ranks), record["tokens"], record["experts"], setup.method.value, f"{record['bytes']:,.0f}",
            f"{record['least']:,.0f}", f"{record['bytes'] / record['least']:.2f}x", f"{record['by_rule']:,.0f}",
            "" if usual is None else f"{usual:,.0f}",
            str(record["kernels"]), str(record["operators"]), str(record["collectives"]),
            end_section=setup.method is CommMethod.MC2,
        )  # fmt: skip
    return table, records


def traffic_record(setup: Setup, works: list[Work]) -> dict[str, Any]:
    """The figures of a row. The bytes counted have to be those of the method's rule."""
    sent = sum(work.sent for work in works) / (PER_RANK * setup.ranks)
    rule = expected_bytes(setup)
    if abs(sent - rule) > 0.01 * rule:
        raise AssertionError(f"{setup}: {sent:.1f} bytes a token, and {rule:.1f} by the method's rule")
    return {
        "ep": setup.ranks,
        "tokens": "own (DP)" if setup.dp > 1 else "shared (TP)",
        "experts": "W8A8" if setup.quantised else "bfloat16",
        "method": setup.method.value,
        "bytes": sent,
        "least": least_bytes(setup),
        "by_rule": rule,
        "by_expert": bytes_by_expert(setup) if setup.method is CommMethod.ALL_TO_ALL_V else None,
        "kernels": max(work.kernels for work in works),
        "operators": max(work.operators for work in works),
        "collectives": max(work.collectives for work in works),
    }


def planned(ranks: int, skew: float) -> tuple[list[int], torch.Tensor] | None:
    """Slots and routing table that ascend-eplb plans from other traffic of the same kind; None without it."""
    try:
        import ascend_eplb as eplb
    except ModuleNotFoundError:
        return None
    load = torch.bincount(chosen(512 * ranks, seed=5, skew=skew).flatten(), minlength=EXPERTS)
    plan = eplb.rebalance(load.unsqueeze(0).double().numpy(), ranks=ranks, slots=EXPERTS + REDUNDANT)
    slots = plan.placement.physical_to_logical[0].flatten().tolist()
    return slots, torch.from_numpy(eplb.routing_table(plan.placement, rows=64)[0].copy())


def balance_table() -> tuple[Table, list[dict[str, Any]]]:
    """The busiest rank's tokens over the mean, with experts in their order and with a planned map."""
    table = Table(
        title=f"most tokens of a rank over the mean; {EXPERTS} experts, 512 tokens a rank, {REDUNDANT} redundant slots where planned",
        title_justify="left",
        caption="planned from one batch, measured on the next; skew s: expert i is drawn about i^-s as often",
    )
    for heading in ("EP", "skew", "experts in order", "planned by ascend-eplb"):
        table.add_column(heading, justify="right")
    cases = list(product(SIZES, SKEWS))
    in_order = list(range(EXPERTS))
    jobs = []
    for ranks, skew in cases:
        jobs.append(partial(measure.load_of, ranks=ranks, slots=in_order, table=None, skew=skew, seed=6))
        slots, by_token = planned(ranks, skew) or (in_order, None)
        jobs.append(partial(measure.load_of, ranks=ranks, slots=slots, table=by_token, skew=skew, seed=6))
    loads = everywhere(jobs)
    records = []
    for (ranks, skew), plain, balanced in zip(cases, loads[::2], loads[1::2], strict=True):
        for load in (plain, balanced):
            if sum(load) != 512 * ranks * TOP_K:
                raise AssertionError(f"{sum(load)} tokens were computed, of {512 * ranks * TOP_K}")
        before, after = (max(load) * ranks / sum(load) for load in (plain, balanced))
        found = after if planned(ranks, skew) else None
        records.append({"ep": ranks, "skew": skew, "in_order": before, "planned": found})
        table.add_row(
            str(ranks),
            f"{skew:g}",
            f"{before:.3f}",
            "ascend-eplb is not installed" if found is None else f"{found:.3f}",
        )
    return table, records


def main() -> int:
    """Print the tables and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args()
    console = Console(record=True, width=150)
    traffic, traffic_records = traffic_table()
    console.print(traffic)
    balance, balance_records = balance_table()
    console.print(balance)
    if options.json:
        options.json.write_text(json.dumps({"traffic": traffic_records, "balance": balance_records}, indent=1) + "\n")
    if options.markdown:
        note = "<!-- python benchmarks/moe/run.py --markdown FILE; the same on every machine -->"
        options.markdown.write_text(f"{note}\n```\n{console.export_text()}```\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
