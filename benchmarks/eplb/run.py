# SPDX-License-Identifier: Apache-2.0
"""ascend-eplb beside the published algorithm and vLLM's policy.

Run: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/eplb/run.py [--json FILE] [--markdown FILE]

Times are CPU time of the one thread, medians of several runs: on a shared machine that is what stays comparable.
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

import ascend_eplb as eplb  # noqa: E402
import numpy as np  # noqa: E402
from published import Peer, plain_numpy, torch_scalars, vllm_policy  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from workloads import WORKLOADS, Workload  # noqa: E402

SEEDS = (0, 1, 2)
RUNS = 7


def timed(call: Callable[[], object], runs: int = RUNS) -> float:
    """Median milliseconds of one thread's CPU time."""
    if runs > 1:
        call()
    spent = []
    for _ in range(runs):
        start = time.thread_time()
        call()
        spent.append((time.thread_time() - start) * 1e3)
    return statistics.median(spent)


def balance_of_slots(ids: np.ndarray, load: np.ndarray, ranks: int) -> float:
    """Balancedness of flat slots, which may hold an expert twice on a rank."""
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in ids])
    sums = np.take_along_axis(load / counts, ids, axis=1).reshape(len(ids), ranks, -1).sum(axis=2)
    return float((sums.mean(axis=1) / sums.max(axis=1)).mean())


def run_peer(peer: Peer | None, workload: Workload, runs: int) -> tuple[float, float] | None:
    """Balancedness and milliseconds of a peer, means over the seeds (a peer of seconds, `runs` 1, over the first)."""
    if peer is None:
        return None
    found = []
    for seed in SEEDS if runs > 1 else SEEDS[:1]:
        load = workload.make(seed)
        sizes = (workload.slots, workload.ranks, workload.nodes, workload.groups)
        ids = peer(load, *sizes)
        found.append(
            (
                balance_of_slots(ids, load, workload.ranks),
                timed(lambda load=load, sizes=sizes: peer(load, *sizes), runs),
            )
        )
    return float(np.mean([f[0] for f in found])), float(np.mean([f[1] for f in found]))


def run_ours(workload: Workload) -> dict[str, float]:
    """Balancedness, bound and milliseconds of `balanced`, means over the seeds."""
    rows = []
    for seed in SEEDS:
        sizes = {name: getattr(workload, name) for name in ("ranks", "slots", "nodes", "groups")}
        load = workload.make(seed)
        plan = eplb.rebalance(load, **sizes)
        of_bound = float((plan.layer_balancedness / plan.layer_bound).mean())
        spent = timed(lambda load=load, sizes=sizes: eplb.rebalance(load, **sizes))
        rows.append((plan.balancedness, plan.bound, of_bound, spent))
    means = np.mean(rows, axis=0)
    return dict(zip(("balancedness", "bound", "of_bound", "milliseconds"), map(float, means), strict=True))


def policies_table(console: Console) -> tuple[Table, list[dict]]:
    """`balanced` beside its peers on every workload."""
    plain, scalars, vllm = plain_numpy(), torch_scalars(), vllm_policy()
    table = Table(
        title="balancedness / CPU ms, one thread",
        title_justify="left",
        caption=f"seeds {SEEDS}, medians of {RUNS} runs",
    )
    version = f"vLLM {vllm[0].split('+')[0]}" if vllm else "vLLM"
    names = ("published, torch scalars", "published, plain numpy", version)
    for heading in ("workload", *names, "ascend-eplb", "bound", "of bound", "faster than", "target"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    records = []
    for workload in track(WORKLOADS, description="policies", console=console, transient=True):
        peers = (
            run_peer(scalars, workload, 1),
            run_peer(plain, workload, 1 if workload.slots > 600 else 3),
            run_peer(vllm and vllm[1], workload, RUNS),
        )
        ours = run_ours(workload)
        reached = ours["of_bound"] if workload.of_bound else ours["balancedness"]
        quality = workload.least is None or reached >= workload.least
        speed = workload.milliseconds is None or ours["milliseconds"] <= workload.milliseconds
        cells = ["not installed" if peer is None else f"{peer[0]:.4f} / {peer[1]:.0f}" for peer in peers]
        factors = " ".join("—" if peer is None else f"{peer[1] / ours['milliseconds']:.1f}x" for peer in peers)
        wanted = "" if workload.least is None else f"{'of bound ' if workload.of_bound else ''}>= {workload.least}"
        wanted += "" if workload.milliseconds is None else f" in {workload.milliseconds:g} ms"
        verdict = f"[{'green' if quality and speed else 'red'}]{wanted} {'met' if quality and speed else 'MISSED'}[/]"
        table.add_row(
            workload.name, *cells, f"[bold]{ours['balancedness']:.4f} / {ours['milliseconds']:.1f}[/]",
            f"{ours['bound']:.4f}", f"{ours['of_bound']:.4f}", factors, verdict if wanted else "",
        )  # fmt: skip
        peer_records = dict(zip(("torch_scalars", "plain_numpy", "vllm"), peers, strict=True))
        records.append(
            {"workload": workload.name, "ours": ours, **peer_records, "target": wanted, "met": quality and speed}
        )
    return table, records


def measures() -> list[tuple[str, str, float, float, bool]]:
    """Other figures: name, unit, found, target, whether smaller is better."""
    found = []
    generator = np.random.default_rng(7)
    for slots, ranks, limit in ((288, 32, 0.12), (272, 16, 0.06)):
        for kind in ("lognormal", "zipf"):
            load = Workload(layers=58, experts=256, slots=slots, ranks=ranks, load=kind).make(0)
            drift = load * generator.lognormal(0, 0.3, load.shape)
            old = eplb.rebalance(load, ranks=ranks, slots=slots).placement
            sizes = {"ranks": ranks, "slots": slots, "previous": old, "policy": "incremental"}
            plan = eplb.rebalance(drift, max_moves=int(limit * 58 * slots), **sizes)
            name = f"incremental {slots}/{ranks} {kind}, drift 0.3"
            found.append((f"{name}: keeping the old", "balancedness", eplb.balancedness(old, drift).mean(), 0.0, False))
            found.append((f"{name}: reached", "balancedness", plan.balancedness, 0.98, False))
            found.append((f"{name}: moved", "fraction", plan.moved_fraction, limit, True))
            spent = timed(lambda drift=drift, sizes=sizes: eplb.rebalance(drift, **sizes), 3)
            found.append((f"{name}: time", "ms", spent, np.inf, True))
    load = WORKLOADS[1].make(0)
    old = eplb.rebalance(load, ranks=32, slots=288).placement
    new = eplb.rebalance(WORKLOADS[1].make(1), ranks=32, slots=288).placement
    found.append(("log2phy, 32 ranks of 58 layers", "ms", timed(lambda: eplb.log2phy_all(old)), 10, True))
    found.append(("transfer plan, full reshuffle", "ms", timed(lambda: eplb.transfer_plan(old, new)), 50, True))
    topology = eplb.Topology(ranks=32, nodes=4)
    found.append(
        ("log2phy_balanced, 32 ranks", "ms", timed(lambda: eplb.log2phy_balanced(old, load, topology)), np.inf, True)
    )
    for name, table in (("classic", eplb.log2phy_all(old)), ("balanced", eplb.log2phy_balanced(old, load, topology))):
        received = eplb.received_loads(old, table, load)
        found.append(
            (f"balancedness kept by the {name} map", "of 1", (received.mean(1) / received.max(1)).mean(), 0.0, False)
        )
    readme = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    large = [[600, 560, 120, 120, 20, 10, 10, 10]]
    for name, case, options, optima in (
        ("README example, global", readme, {}, (136, 172)),
        ("README example, by node", readme, {"nodes": 2, "groups": 4}, (151, 179.5)),
        ("few large experts", large, {}, (196.67,)),
    ):
        peaks = eplb.rank_loads(eplb.rebalance(case, ranks=8, slots=16, **options).placement, case).max(axis=1)
        for layer, optimum in enumerate(optima):
            found.append((f"{name}, layer {layer}", "peak", peaks[layer], optimum, True))
    return [(name, unit, float(value), float(target), smaller) for name, unit, value, target, smaller in found]


def measures_table(rows: list[tuple[str, str, float, float, bool]]) -> Table:
    """The other figures with their targets."""
    table = Table(title="migration, maps, known optima", title_justify="left")
    for heading in ("what", "found", "target"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, unit, value, target, smaller in rows:
        wanted = "" if target in (0.0, np.inf) else f"{'<=' if smaller else '>='} {target:g}"
        met = value <= target + 0.005 * (unit == "peak") if smaller else value >= target
        table.add_row(
            name,
            f"{value:.4g} {unit}",
            f"[{'green' if met else 'red'}]{wanted} {'' if not wanted else 'met' if met else 'MISSED'}[/]",
        )
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
    rows = measures()
    console.print(measures_table(rows))
    machine = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    console.print(" ".join(f"{key} {value}" for key, value in machine.items()), style="dim")
    if options.json:
        others = [dict(zip(("what", "unit", "found", "target"), row, strict=False)) for row in rows]
        result = {"machine": machine, "seeds": SEEDS, "runs": RUNS, "policies": records, "others": others}
        options.json.write_text(json.dumps(result, indent=1, default=str).replace("Infinity", "null") + "\n")
    if options.markdown:
        options.markdown.write_text(f"```\n{console.export_text()}```\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
