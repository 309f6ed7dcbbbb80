# SPDX-License-Identifier: Apache-2.0
"""The commands that balance: plan and simulate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ascend_eplb.cli import options as option
from ascend_eplb.cli.output import check_outputs, errors, print_json
from ascend_eplb.cli.plot import check_plot, plot_rank_loads, plot_scores
from ascend_eplb.cli.render import plan_table, score_table
from ascend_eplb.formats import load_placement, read_loads, save_placement
from ascend_eplb.load import decayed_load, mean_load, peak_load
from ascend_eplb.metrics import FloatArray, balancedness, rank_loads
from ascend_eplb.migrate import TransferPlan, transfer_plan
from ascend_eplb.placement import replica_counts
from ascend_eplb.plan import default_placement, reduce_to_survivors, solve
from ascend_eplb.policies.base import Problem
from ascend_eplb.simulate import simulate as replay

__all__ = ["plan", "simulate"]

_MOST_EXPERT_MB = 1_000_000  # a terabyte


def plan(
    load: option.Load,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.", show_default=False)],
    ranks: option.Ranks,
    slots: option.Slots,
    nodes: option.Nodes = 1,
    groups: option.Groups = 1,
    old: option.From = None,
    max_moves: option.Moves = None,
    max_moves_per_layer: option.LayerMoves = None,
    max_replicas: option.Replicas = 0,
    policy: option.Policy = "",
    target: option.Target = 0.982,
    weighting: option.Weighting = "mean",
    half_life: option.HalfLife = None,
    risk: option.Risk = 1.0,
    failed: Annotated[str, typer.Option(help="Ranks that failed, as 3,7: places over the others only.")] = "",
    expert_mb: Annotated[float, typer.Option(help="Megabytes of one expert in one layer.")] = 44.0,
    plot: Annotated[Path | None, typer.Option(help="PNG of rank loads before and after.")] = None,
    as_json: option.AsJson = False,
) -> None:
    """Place experts for a load; says what it gains, and what moves if a placement is in force (--from)."""
    check_outputs({"--output": output, "--plot": plot}, {"--load": load, "--from": old})
    if not 0 <= expert_mb <= _MOST_EXPERT_MB:
        raise ValueError(f"--expert-mb={expert_mb} must be from 0 to {_MOST_EXPERT_MB}")
    if plot is not None:
        check_plot(plot)
    load_LE = _weigh(weighting, half_life, risk)(read_loads(load))
    problem = Problem(
        load=load_LE, ranks=ranks, slots=slots, nodes=nodes, groups=groups,
        previous=None if old is None else load_placement(old, ranks=ranks),
        max_moves=max_moves, max_moves_per_layer=max_moves_per_layer, max_replicas=max_replicas, target=target,
    )  # fmt: skip
    lost = 0
    if failed:
        lost, problem = _without(problem, _numbers("--failed", failed))
    name = policy or _default_policy(problem)
    with errors().status("placing experts"):
        result = solve(problem, name)
    save_placement(result.placement, output)
    previous = problem.previous
    start = previous or default_placement(problem)
    before = "spread" if old is None else str(old), float(balancedness(start, load_LE).mean())
    transfers = None if previous is None else transfer_plan(previous, result.placement, nodes=problem.nodes)
    if plot is not None:
        plot_rank_loads(rank_loads(start, load_LE), rank_loads(result.placement, load_LE), plot)
    expert_bytes = round(expert_mb * 1e6)
    if as_json:
        print_json(
            file=str(output), policy=name, ranks=problem.ranks, slots=problem.slots,
            before=before[0], balancedness_before=before[1],
            balancedness=result.balancedness, worst_layer=result.layer_balancedness.min(), bound=result.bound,
            **_costs(transfers, expert_bytes), lost=lost,
        )  # fmt: skip
        return
    console = Console()
    console.print(plan_table(result, before, transfers, expert_bytes, lost))
    console.print(Text.assemble("wrote ", (str(output), "bold"), f" (policy {name})"), soft_wrap=True)


def simulate(
    load: option.Load,
    ranks: option.Ranks,
    slots: option.Slots,
    nodes: option.Nodes = 1,
    groups: option.Groups = 1,
    old: option.From = None,
    max_moves: option.Moves = None,
    max_moves_per_layer: option.LayerMoves = None,
    max_replicas: option.Replicas = 0,
    policy: option.Policy = "",
    target: option.Target = 0.982,
    window: Annotated[int, typer.Option(help="Steps of a window.")] = 1,
    weighting: option.Weighting = "mean",
    half_life: option.HalfLife = None,
    risk: option.Risk = 1.0,
    plot: Annotated[Path | None, typer.Option(help="PNG of the balancedness over time.")] = None,
    as_json: option.AsJson = False,
) -> None:
    """Replay recorded loads: plan on one window, score on the next. Move limits are for each window."""
    check_outputs({"--plot": plot}, {"--load": load, "--from": old})
    if plot is not None:
        check_plot(plot)
    history = read_loads(load)
    problem = Problem(
        load=history[0], ranks=ranks, slots=slots, nodes=nodes, groups=groups, max_replicas=max_replicas, target=target
    )
    previous = default_placement(problem) if old is None else load_placement(old, ranks=ranks)
    problem = replace(problem, previous=previous, max_moves=max_moves, max_moves_per_layer=max_moves_per_layer)
    name = policy or _default_policy(problem)
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = errors()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=max(len(history) // max(window, 1) - 1, 0))
        scores = replay(
            history, problem, name, window=window, weigh=_weigh(weighting, half_life, risk),
            advance=lambda: progress.advance(task),
        )  # fmt: skip
    if plot is not None:
        plot_scores(scores, plot)
    if as_json:
        print_json(policy=name, windows=[asdict(score) for score in scores])
        return
    Console().print(score_table(scores, problem.layers * problem.slots, name))


def _weigh(name: str, half_life: float | None, risk: float) -> Callable[[FloatArray], FloatArray]:
    """The function that makes one load `[L, E]` of the steps `[T, L, E]`."""
    if half_life is not None and not half_life > 0:
        raise ValueError(f"--half-life={half_life} must be positive")
    if name == "mean":
        return mean_load
    if name == "decayed":
        return lambda history: decayed_load(history, half_life or max(len(history) / 4, 1.0))
    if name == "peak":
        return partial(peak_load, risk=risk)
    raise ValueError(f"--weighting={name} is not one of mean, decayed, peak")


def _default_policy(problem: Problem) -> str:
    limited = problem.max_moves is not None or problem.max_moves_per_layer is not None
    return "incremental" if limited else "balanced"


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option}={text} must be rank numbers with commas between, as 3,7") from error


def _without(problem: Problem, failed: tuple[int, ...]) -> tuple[int, Problem]:
    """How many experts of all layers are on failed ranks only, and the problem without those ranks."""
    left = reduce_to_survivors(problem, failed)
    if problem.previous is None:
        return 0, left
    alive = [rank for rank in range(problem.ranks) if rank not in failed]
    ids_LS = problem.previous.physical_to_logical[:, alive].reshape(problem.layers, -1)
    return int((replica_counts(ids_LS, problem.num_experts) == 0).sum()), left


def _costs(transfers: TransferPlan | None, expert_bytes: int) -> dict[str, Any]:
    """What a plan moves; None for each number where no placement is in force."""
    if transfers is None:
        return {"moved": None, "between_nodes": None, "bytes_moved": None, "bytes_between_nodes": None}
    return {
        "moved": transfers.bytes_moved(1),
        "between_nodes": transfers.bytes_between_nodes(1),
        "bytes_moved": transfers.bytes_moved(expert_bytes),
        "bytes_between_nodes": transfers.bytes_between_nodes(expert_bytes),
    }
