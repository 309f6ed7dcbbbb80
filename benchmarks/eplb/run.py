# SPDX-License-Identifier: Apache-2.0
"""ascend-eplb beside the published algorithm and vLLM's policy.

Run: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/eplb/run.py [--json FILE] [--markdown FILE]

Times are CPU time of the one thread, medians of several runs: on a shared machine that is what stays comparable. Each
workload is planned by all in turn, so that they meet the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # the peers' torch needs no device

import ascend_eplb as eplb  # noqa: E402
import numpy as np  # noqa: E402
from measures import LEAST, Measure, Migration, measures, migrations  # noqa: E402
from published import Peer, plain_numpy, torch_scalars, vllm_policy  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from workloads import SEEDS, WORKLOADS, Workload  # noqa: E402

RUNS = 7
PEERS = ("published, torch scalars", "published, plain numpy", "vLLM")


def timed(call: Callable[[], object], runs: int = RUNS) -> tuple[object, float]:
    """What a call returns, and the median milliseconds of one thread's CPU time; the first of several runs warms up."""
    result, spent = None, []
    for _ in range(runs + (runs > 1)):
        start = time.thread_time()
        result = call()
        spent.append((time.thread_time() - start) * 1e3)
    return result, statistics.median(spent[1:] if runs > 1 else spent)


def balance_of_slots(ids: np.ndarray, load: np.ndarray, ranks: int) -> float:
    """Balancedness of flat slots, which may hold an expert twice on a rank."""
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in ids])
    sums = np.take_along_axis(load / counts, ids, axis=1).reshape(len(ids), ranks, -1).sum(axis=2)
    return float((sums.mean(axis=1) / sums.max(axis=1)).mean())


def run_workload(workload: Workload, peers: list[tuple[Peer | None, int]]) -> dict:
    """Means over the seeds of balancedness and milliseconds: of each peer (with this many runs) and of `balanced`."""
    sizes = (workload.slots, workload.ranks, workload.nodes, workload.groups)
    named = dict(zip(("slots", "ranks", "nodes", "groups"), sizes, strict=True))
    rows, ours = [[] for _ in peers], []
    for seed in SEEDS:
        load = workload.make(seed)
        for row, (peer, runs) in zip(rows, peers, strict=True):
            if peer is not None:
                ids, spent = timed(lambda peer=peer, load=load: peer(load, *sizes), runs)
                row.append((balance_of_slots(ids, load, workload.ranks), spent))
        plan, spent = timed(lambda load=load: eplb.rebalance(load, **named))
        of_bound = float((plan.layer_balancedness / plan.layer_bound).mean())
        ours.append((plan.balancedness, plan.bound, of_bound, spent))
    names = ("balancedness", "bound", "of_bound", "milliseconds")
    return {
        "workload": workload.name,
        "ours": dict(zip(names, np.mean(ours, axis=0).tolist(), strict=True)),
        "peers": [np.mean(row, axis=0).tolist() if row else None for row in rows],
    }


def verdicts(workload: Workload, record: dict) -> list[tuple[str, bool]]:
    """Each target with whether it is met; those beside a peer that is not installed are left out."""
    ours, (published, _, vllm) = record["ours"], record["peers"]
    found = []
    if workload.least is not None:
        reached = ours["of_bound"] if workload.of_bound else ours["balancedness"]
        found.append((f">= {workload.least}{' of bound' if workload.of_bound else ''}", reached >= workload.least))
    if workload.milliseconds is not None:
        found.append((f"<= {workload.milliseconds:g} ms", ours["milliseconds"] <= workload.milliseconds))
    for peer, least, name in ((published, workload.times_published, "published"), (vllm, workload.times_vllm, "vLLM")):
        if peer is not None and least is not None:
            found.append((f">= {least:g}x {name}", peer[1] >= least * ours["milliseconds"]))
    return found


def policies_table(console: Console) -> tuple[Table, list[dict]]:
    """`balanced` beside its peers on every workload."""
    vllm = vllm_policy()
    table = Table(
        title="balancedness / CPU ms, one thread",
        title_justify="left",
        caption=f"seeds {SEEDS}; medians of {RUNS} runs (the published algorithm: 1 on torch, 3 in numpy)",
    )
    names = (*PEERS[:2], f"vLLM {vllm[0]}" if vllm else PEERS[2])
    for heading in ("workload", *names, "ascend-eplb", "bound", "of bound", "times as fast", "targets"):
        table.add_column(heading, justify="left" if heading in ("workload", "targets") else "right")
    records = []
    for workload in track(WORKLOADS, description="policies", console=console, transient=True):
        slow = 1 if workload.slots > 600 else 3
        peers = [(torch_scalars(), 1), (plain_numpy(), slow), (vllm and vllm[1], RUNS)]
        record = run_workload(workload, peers)
        ours = record["ours"]
        cells = ["not installed" if peer is None else f"{peer[0]:.4f} / {peer[1]:.0f}" for peer in record["peers"]]
        factors = " ".join("—" if peer is None else f"{peer[1] / ours['milliseconds']:.1f}" for peer in record["peers"])
        judged = verdicts(workload, record)
        words = "\n".join(
            f"[{'green' if met else 'red'}]{name} {'met' if met else 'MISSED'}[/]" for name, met in judged
        )
        table.add_row(
            workload.name, *cells, f"[bold]{ours['balancedness']:.4f} / {ours['milliseconds']:.1f}[/]",
            f"{ours['bound']:.4f}", f"{ours['of_bound']:.4f}", factors, words, end_section=True,
        )  # fmt: skip
        record["peers"] = dict(zip(("torch_scalars", "plain_numpy", "vllm"), record["peers"], strict=True))
        records.append({**record, "targets": dict(judged)})
    return table, records


def migrations_table(rows: list[Migration]) -> Table:
    """Ways to follow a drift, with what they move."""
    table = Table(
        title="load drifted by lognormal(0.3): following it from the best placement", title_justify="left",
        caption=f"seeds {SEEDS}: the worst balancedness, the most moved, median CPU ms",
    )  # fmt: skip
    for heading in ("workload", "way", "balancedness", "moved", "ms", "target"):
        table.add_column(heading, justify="left" if heading in ("workload", "way") else "right")
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1].workload != row.workload
        first = index == 0 or rows[index - 1].workload != row.workload
        colour, word = ("green", "met") if row.met else ("red", "MISSED")
        verdict = f"[{colour}]>= {LEAST} within {row.most_moved:.0%} {word}[/]" if row.most_moved else ""
        table.add_row(
            row.workload if first else "", row.way, f"{row.balancedness:.4f}", f"{row.moved:.1%}",
            f"{row.milliseconds:.0f}", verdict, end_section=last,
        )  # fmt: skip
    return table


def measures_table(rows: list[Measure]) -> Table:
    """The other figures with their targets."""
    table = Table(title="maps, transfers, known optima", title_justify="left")
    for heading in ("what", "found", "target"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        colour = "green" if row.met else "red"
        verdict = "" if row.target is None else f"[{colour}]{row.wanted} {'met' if row.met else 'MISSED'}[/]"
        table.add_row(row.name, row.figure, verdict)
    return table


def main() -> int:
    """Print the tables and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args()
    console = Console(record=True, width=190 if not sys.stdout.isatty() else None)
    policies, records = policies_table(Console(stderr=True))
    console.print(policies)
    moves = list(migrations(timed, vllm_policy()))
    console.print(migrations_table(moves))
    rows = measures(timed)
    console.print(measures_table(rows))
    machine = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }
    console.print(" ".join(f"{key} {value}" for key, value in machine.items()), style="dim")
    if options.json:
        result = {
            "machine": machine, "seeds": SEEDS, "runs": RUNS, "policies": records,
            "migrations": [row.as_dict() for row in moves], "others": [row.as_dict() for row in rows],
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    if options.markdown:
        options.markdown.write_text(f"```\n{console.export_text()}```\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
