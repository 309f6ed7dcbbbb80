# SPDX-License-Identifier: Apache-2.0
"""The commands: generate, check, show, plan, simulate, convert."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ascend_eplb.cli.plot import plot_rank_loads, plot_scores
from ascend_eplb.cli.render import placement_table, plan_table, print_error, rank_table, score_table, summary_table
from ascend_eplb.formats import load_placement, read_loads, save_placement
from ascend_eplb.load import decayed_load, mean_load, peak_load
from ascend_eplb.metrics import FloatArray, balancedness, rank_loads
from ascend_eplb.migrate import transfer_plan
from ascend_eplb.placement import Placement, checkpoint, spread
from ascend_eplb.plan import default_placement, solve
from ascend_eplb.policies.base import Problem
from ascend_eplb.policies.registry import policy_names
from ascend_eplb.simulate import simulate as replay

__all__ = ["run"]

_LAYOUTS = {"spread": spread, "checkpoint": checkpoint}

app = typer.Typer(
    name="ascend-eplb", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Expert placement for mixture-of-experts serving.", context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Ranks = Annotated[int | None, typer.Option(help="Ranks, where the file does not say it (YAML, foreign arrays).")]
File = Annotated[Path, typer.Argument(help="Placement: .json, .npz, .npy, .yaml.", show_default=False)]
Load = Annotated[Path, typer.Option(help="Load dump: .npy, .npz or load_history .json.", show_default=False)]
Policy = Annotated[str, typer.Option(help=f"One of {', '.join(policy_names())}.")]
Window = Annotated[str, typer.Option(help="How steps become one load: mean, decayed, peak.")]


def run(arguments: list[str] | None = None) -> int:
    """Run a command; 0 is success, 1 invalid input or usage, with the reason on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(args=arguments, standalone_mode=False, prog_name="ascend-eplb")
    except (typer.Abort, KeyboardInterrupt):
        print_error(Console(stderr=True), "interrupted")
        return 1
    except Exception as error:
        if not _is_expected(error):
            raise
        if reason := _reason(error):  # empty where typer has printed the help already
            print_error(Console(stderr=True), reason)
            if "--json" in arguments:
                _print_json(error=reason)
        return 1
    return status if isinstance(status, int) else 0  # what typer.Exit was raised with


@app.command()
def generate(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.", show_default=False)],
    experts: Annotated[int, typer.Option(help="Logical experts.", show_default=False)],
    ranks: Annotated[int, typer.Option(help="Ranks.", show_default=False)],
    redundant: Annotated[int, typer.Option(help="Redundant experts.")] = 0,
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 1,
    layout: Annotated[str, typer.Option(help="spread or checkpoint.")] = "spread",
    as_json: AsJson = False,
) -> None:
    """Write a default placement, made without a load."""
    if layout not in _LAYOUTS:
        raise ValueError(f"--layout={layout} is not one of {', '.join(_LAYOUTS)}")
    placement = _LAYOUTS[layout](num_experts=experts, ranks=ranks, redundant=redundant, layers=layers)
    save_placement(placement, output)
    _print_summary(placement, f"wrote {output}", as_json, file=str(output))


@app.command()
def check(file: File, ranks: Ranks = None, as_json: AsJson = False) -> None:
    """Validate a placement; exit status 1 says what is wrong and where."""
    _print_summary(load_placement(file, ranks=ranks), f"{file} is valid", as_json, valid=True, file=str(file))


@app.command()
def show(
    file: File,
    layer: Annotated[int | None, typer.Option(help="Layer number; the first by default.")] = None,
    rank: Annotated[int | None, typer.Option(help="One rank in detail.")] = None,
    load: Annotated[Path | None, typer.Option(help="Load dump for heat bars.")] = None,
    ranks: Ranks = None,
    as_json: AsJson = False,
) -> None:
    """Show a layer of a placement, with heat bars where there is a load."""
    placement = load_placement(file, ranks=ranks)
    layer_id = placement.layer_ids[0] if layer is None else layer
    slots = placement.layer(layer_id)
    loads = None if load is None else mean_load(read_loads(load))
    if rank is not None and not 0 <= rank < placement.ranks:
        raise ValueError(f"--rank={rank} is not in 0..{placement.ranks - 1}")
    if as_json:
        fields: dict[str, Any] = {"layer": layer_id, "experts": slots if rank is None else slots[rank]}
        if rank is not None:
            fields["rank"] = rank
        if loads is not None:
            row = placement.layer_ids.index(layer_id)
            fields["rank_loads"] = rank_loads(placement, loads)[row]
            fields["balancedness"] = balancedness(placement, loads)[row]
        _print_json(**fields)
        return
    console = Console()
    if rank is None:
        console.print(placement_table(placement, layer_id, loads))
    else:
        console.print(rank_table(placement, layer_id, rank))


@app.command()
def plan(
    load: Load,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.", show_default=False)],
    ranks: Annotated[int, typer.Option(help="Ranks.", show_default=False)],
    slots: Annotated[int, typer.Option(help="Physical slots over all ranks.", show_default=False)],
    nodes: Annotated[int, typer.Option(help="Nodes of equally many ranks.")] = 1,
    groups: Annotated[int, typer.Option(help="Expert groups, bound to nodes where nodes > 1 divides them.")] = 1,
    old: Annotated[Path | None, typer.Option("--from", help="Placement in force.")] = None,
    max_moves: Annotated[int | None, typer.Option(help="Most slots that may move, over all layers.")] = None,
    max_replicas: Annotated[int, typer.Option(help="Most replicas of one expert; 0 is no limit.")] = 0,
    policy: Policy = "",
    window: Window = "mean",
    expert_mb: Annotated[float, typer.Option(help="Megabytes of one expert in one layer.")] = 44.0,
    plot: Annotated[Path | None, typer.Option(help="PNG of rank loads before and after.")] = None,
    as_json: AsJson = False,
) -> None:
    """Place experts for a load. The policy is `balanced`, or `incremental` where --max-moves is given."""
    if not 0 <= expert_mb < float("inf"):
        raise ValueError(f"--expert-mb={expert_mb} must be finite and not negative")
    load_LE = _window(read_loads(load), window)
    previous = None if old is None else load_placement(old, ranks=ranks)
    problem = Problem(
        load=load_LE, ranks=ranks, slots=slots, nodes=nodes, groups=groups, previous=previous,
        max_moves=max_moves, max_replicas=max_replicas,
    )  # fmt: skip
    name = policy or ("balanced" if max_moves is None else "incremental")
    result = solve(problem, name)
    save_placement(result.placement, output)
    before, sent = None, (0, 0)
    if previous is not None:
        before = float(balancedness(previous, load_LE).mean())
        transfers = transfer_plan(previous, result.placement, nodes=nodes)
        sent = (transfers.bytes_moved(1), transfers.bytes_between_nodes(1))
    if plot is not None:
        start = previous or default_placement(problem)
        plot_rank_loads(rank_loads(start, load_LE), rank_loads(result.placement, load_LE), plot)
    expert_bytes = round(expert_mb * 1e6)
    if as_json:
        _print_json(
            file=str(output), policy=name, balancedness_before=before, balancedness=result.balancedness,
            worst_layer=result.layer_balancedness.min(), bound=result.bound,
            moved=None if previous is None else result.moved,
            between_nodes=None if previous is None else sent[1],
            bytes_moved=None if previous is None else sent[0] * expert_bytes,
        )  # fmt: skip
        return
    console = Console()
    console.print(plan_table(result, before, expert_bytes, sent))
    console.print(f"wrote [bold]{output}[/bold] (policy {name})")


@app.command()
def simulate(
    load: Load,
    ranks: Annotated[int, typer.Option(help="Ranks.", show_default=False)],
    slots: Annotated[int, typer.Option(help="Physical slots over all ranks.", show_default=False)],
    nodes: Annotated[int, typer.Option(help="Nodes of equally many ranks.")] = 1,
    groups: Annotated[int, typer.Option(help="Expert groups.")] = 1,
    policy: Policy = "balanced",
    window: Annotated[int, typer.Option(help="Steps of a window.")] = 1,
    old: Annotated[Path | None, typer.Option("--from", help="Placement at the start; spread by default.")] = None,
    max_moves: Annotated[int | None, typer.Option(help="Most slots that may move a window.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the balancedness over time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded loads: plan on one window, score on the next."""
    history = read_loads(load)
    problem = Problem(load=history[0], ranks=ranks, slots=slots, nodes=nodes, groups=groups)
    previous = default_placement(problem) if old is None else load_placement(old, ranks=ranks)
    problem = replace(problem, previous=previous, max_moves=max_moves)
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=max(len(history) // max(window, 1) - 1, 0))
        scores = replay(history, problem, policy, window=window, advance=lambda: progress.advance(task))
    if plot is not None:
        plot_scores(scores, plot)
    if as_json:
        _print_json(policy=policy, windows=[asdict(score) for score in scores])
        return
    Console().print(score_table(scores, problem.layers * problem.slots))


@app.command()
def convert(
    file: File,
    output: Annotated[Path, typer.Argument(help="File to write; its ending is the format.", show_default=False)],
    ranks: Ranks = None,
    layers: Annotated[int | None, typer.Option(help="Layers wanted; those the file lacks take the default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a placement in another format."""
    placement = load_placement(file, ranks=ranks, layers=layers)
    save_placement(placement, output)
    _print_summary(placement, f"wrote {output}", as_json, file=str(output))


def _window(history: FloatArray, name: str) -> FloatArray:
    """One load from all steps."""
    if name == "mean":
        return mean_load(history)
    if name == "decayed":
        return decayed_load(history, half_life=max(len(history) / 4, 1.0))
    if name == "peak":
        return peak_load(history)
    raise ValueError(f"--window={name} is not one of mean, decayed, peak")


def _print_summary(placement: Placement, title: str, as_json: bool, **fields: Any) -> None:
    if as_json:
        _print_json(
            **fields, layers=placement.layers, experts=placement.num_experts, ranks=placement.ranks,
            slots_per_rank=placement.slots_per_rank, slots=placement.slots, redundant=placement.redundant,
        )  # fmt: skip
    else:
        Console().print(summary_table(placement, title))


def _print_json(**fields: Any) -> None:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    sys.stdout.write(json.dumps(fields, default=plain) + "\n")


def _is_expected(error: Exception) -> bool:
    """Whether an error is the user's to mend, so that its message is enough."""
    usage = isinstance(error, typer.BadParameter) or hasattr(error, "format_message")
    kinds = (OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError, OverflowError)
    return usage or isinstance(error, kinds)


def _reason(error: Exception) -> str:
    message = getattr(error, "format_message", None)  # of the command line library, which typer may or may not bundle
    if message is not None:
        return str(message())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
