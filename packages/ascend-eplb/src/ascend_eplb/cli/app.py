# SPDX-License-Identifier: Apache-2.0
"""The commands: generate, check, show, plan, simulate, convert."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ascend_eplb.cli.options import AsJson, Experts, File, MoeLayers, RanksOfFile
from ascend_eplb.cli.output import check_outputs, discard, print_error, print_json, print_summary
from ascend_eplb.cli.planning import plan, simulate
from ascend_eplb.cli.render import placement_table, rank_table
from ascend_eplb.formats import load_placement, read_loads, save_placement, usual_numbering
from ascend_eplb.layers import fit_layers
from ascend_eplb.load import mean_load
from ascend_eplb.maps import expert_map
from ascend_eplb.metrics import balancedness, rank_loads
from ascend_eplb.placement import Placement, checkpoint, spread
from ascend_eplb.ranges import parse_ranges

__all__ = ["run"]

_LAYOUTS = {"spread": spread, "checkpoint": checkpoint}

app = typer.Typer(
    name="ascend-eplb", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def run(arguments: list[str] | None = None) -> int:
    """Run a command; 0 is success, 1 invalid input or usage, with the reason on standard error.

    If the reader of standard output closes it, as `head` does, the status is 1 without a message, as in typer's own
    handling. If standard output was closed from the start, nothing is printed, as with Python's `print`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # an encoding without box characters gets question marks, not an error
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich exits where a pipe is closed
        discard(sys.stdout)
        return 1
    except OSError as error:
        discard(sys.stdout)
        print_error(f"standard output: {_reason(error)}")
        return 1
    return status


def _run(arguments: list[str]) -> int:
    """Run a command, print its error if it fails, and return the status. OSError: standard output cannot be written."""
    try:
        status = app(args=arguments, standalone_mode=False, prog_name="ascend-eplb")
    except (typer.Abort, KeyboardInterrupt):
        print_error("interrupted")
        return 1
    except Exception as error:
        if not _is_expected(error) or (isinstance(error, OSError) and error.filename is None):  # files are always named
            raise
        if reason := _reason(error):  # empty where typer has printed the help already
            print_error(reason)
            if "--json" in arguments:
                print_json(error=reason)
        return 1
    return status if isinstance(status, int) else 0  # what typer.Exit was raised with


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"ascend-eplb {installed_version('ascend-eplb')}\n")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Expert placement for mixture-of-experts serving."""


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
    print_summary(placement, f"wrote {output}", as_json, file=str(output))


@app.command()
def check(
    file: File, ranks: RanksOfFile = None, experts: Experts = 0, moe_layers: MoeLayers = "", as_json: AsJson = False
) -> None:
    """Validate a placement; exit status 1 says what is wrong and where."""
    placement = load_placement(file, ranks=ranks, num_experts=experts)
    fields: dict[str, Any] = {}
    if moe_layers:
        placement, fields = _fit(placement, file, moe_layers, as_json)
    print_summary(placement, f"{file} is valid", as_json, valid=True, file=str(file), **fields)


@app.command()
def show(
    file: File,
    layer: Annotated[int | None, typer.Option(help="Layer number; the first by default.")] = None,
    rank: Annotated[int | None, typer.Option(help="One rank in detail.")] = None,
    load: Annotated[Path | None, typer.Option(help="Load dump for heat bars.")] = None,
    ranks: RanksOfFile = None,
    experts: Experts = 0,
    as_json: AsJson = False,
) -> None:
    """Show a layer of a placement, with heat bars where there is a load."""
    placement = load_placement(file, ranks=ranks, num_experts=experts)
    layer_id = placement.layer_ids[0] if layer is None else layer
    slots = placement.layer(layer_id)
    loads = None if load is None else mean_load(read_loads(load))
    if rank is not None and not 0 <= rank < placement.ranks:
        raise ValueError(f"--rank={rank} is not in 0..{placement.ranks - 1}")
    if as_json:
        fields: dict[str, Any] = {"layer": layer_id, "experts": slots if rank is None else slots[rank]}
        if rank is not None:
            fields |= {"rank": rank, "expert_map": expert_map(placement, rank)[placement.layer_ids.index(layer_id)]}
        if loads is not None:
            row = placement.layer_ids.index(layer_id)
            fields["rank_loads"] = rank_loads(placement, loads)[row]
            fields["balancedness"] = balancedness(placement, loads)[row]
        print_json(**fields)
        return
    console = Console()
    if rank is None:
        console.print(placement_table(placement, layer_id, loads))
    else:
        console.print(rank_table(placement, layer_id, rank))


app.command()(plan)
app.command()(simulate)


@app.command()
def convert(
    file: File,
    output: Annotated[Path, typer.Argument(help="File to write; its ending is the format.", show_default=False)],
    ranks: RanksOfFile = None,
    experts: Experts = 0,
    layers: Annotated[
        int | None,
        typer.Option(help="Layers 0 to this less 1, as the file numbers them; those it lacks take the default."),
    ] = None,
    moe_layers: MoeLayers = "",
    as_json: AsJson = False,
) -> None:
    """Rewrite a placement in another format, or with other layer numbers."""
    check_outputs({"OUTPUT": output}, {"FILE": file})
    if layers is not None and moe_layers:
        raise ValueError(f"--layers={layers} and --moe-layers={moe_layers} exclude each other: give one of them")
    placement = load_placement(file, ranks=ranks, num_experts=experts, layers=layers)
    fields: dict[str, Any] = {}
    if moe_layers:
        placement, fields = _fit(placement, file, moe_layers, as_json)
    save_placement(placement, output)
    print_summary(placement, f"wrote {output}", as_json, file=str(output), **fields)


def _fit(placement: Placement, file: Path, moe_layers: str, as_json: bool) -> tuple[Placement, dict[str, Any]]:
    """The placement of these MoE layers; says how the file's layer numbers were read, or returns it as JSON fields."""
    try:
        model_layers = parse_ranges(moe_layers)
    except ValueError as error:
        raise ValueError(f"--moe-layers={error}") from error
    try:
        fitted, match = fit_layers(placement, model_layers, usual=usual_numbering(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not as_json:
        Console().print(Text(f"{file}: {match}"), soft_wrap=True)
    return fitted, {"numbering": match.numbering.name.lower(), "lacking": match.lacking, "unused": match.unused}


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
