# SPDX-License-Identifier: Apache-2.0
"""Command line: `vllm-ascend doctor`, `vllm-ascend explain` and `vllm-ascend eplb`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_ascend import doctor as diagnosis
from vllm_ascend.eplb import status

if TYPE_CHECKING:
    from vllm_ascend.doctor import Report
    from vllm_ascend.explain import Explained
    from vllm_ascend.probe.expected import Result

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(status.app, name="eplb")


@app.callback()
def _root() -> None:
    """VLLM on Ascend NPUs."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="Run every kernel, on the first device or the first two, and compare it with its meaning."
        ),
    ] = False,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write what to attach to an issue: versions, environment, kernels.")
    ] = None,
    silence: Annotated[
        float, typer.Option(help="Seconds after which a kernel that has not answered is given up.", min=1)
    ] = 300,
) -> None:
    """Say whether vLLM will serve on an NPU here, and why not. Exit status 1 when it will not, or when a kernel is not as it should be."""
    report = diagnosis.examine()
    if not as_json:
        _print_report(report)
    results = _probe(silence, quiet=as_json) if probe and report.active else None
    if as_json:
        kernels = {} if results is None else {"kernels": [asdict(result) for result in results]}
        typer.echo(json.dumps(report.as_dict() | kernels, indent=2))
    if report_file is not None:
        _write_report(report_file, report, results)
    good = report.active and all(result.is_good for result in results or ())
    raise typer.Exit(0 if good else 1)


def _probe(silence: float, *, quiet: bool) -> list[Result]:
    """Run the kernels, and print the table row by row unless `quiet`."""
    from vllm_ascend.doctor_report import summary
    from vllm_ascend.probe.run import run_all

    colours = {"equal": "green", "within bound": "green", "not run": "yellow"}
    console = Console()
    results: list[Result] = []
    try:
        for result in run_all(silence):
            results.append(result)
            if quiet:
                continue
            line = Text(f"{result.verdict:12} ", style=colours.get(result.verdict, "red"))
            line.append(f"{result.kernel} ({result.shape})" if result.shape else result.kernel, style="default")
            if result.detail:
                line.append(f": {result.detail}", style="dim")
            console.print(line, soft_wrap=True)
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if not quiet:
        console.print(f"kernels: {summary(results)}")
    return results


def _write_report(path: Path, report: Report, results: list[Result] | None) -> None:
    from vllm_ascend import envs
    from vllm_ascend.doctor_report import text, write

    try:
        write(path, text(report, envs.for_report(), results))
    except OSError as error:
        typer.echo(f"error: the report cannot be written to {path}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


def _print_report(report: Report) -> None:
    table = Table("what", "version", title="vllm-ascend doctor", title_justify="left")
    for name, found in report.versions.items():
        table.add_row(name, found)
    kind = "simulated" if report.simulated else "real"
    table.add_row("devices", f"{len(report.devices)} x {report.devices[0]} ({kind})" if report.devices else "none")
    console = Console()
    console.print(table)
    if report.active:
        console.print("plugin: [green]active[/green]")
    else:
        console.print("plugin: [red]inactive[/red] because ", end="")
        console.print(report.reason, markup=False, highlight=False, soft_wrap=True)
    if report.not_installed:
        console.print(report.not_installed, markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the Hugging Face hub.")],
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option("--pipeline-parallel-size", "-pp", min=1)] = 1,
    data_parallel_size: Annotated[int, typer.Option("--data-parallel-size", "-dp", min=1)] = 1,
    enable_expert_parallel: Annotated[bool, typer.Option("--enable-expert-parallel", "-ep")] = False,
    additional_config: Annotated[str, typer.Option(help="This plugin's options, as JSON.")] = "{}",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rank: Annotated[int, typer.Option(help="The global rank to look at.", min=0)] = 0,
    tokens: Annotated[
        int, typer.Option(help="Tokens of a step, which decide whether FlashComm1 takes part.", min=1)
    ] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every layer by itself.")] = False,
) -> None:
    """Print the op, the group and the bytes of every linear layer under these options, without starting an engine."""
    from ascend_comm import Topology

    from vllm_ascend import explain as explanation
    from vllm_ascend.config import AscendConfig
    from vllm_ascend.json_object import parse_object
    from vllm_ascend.models import quantised_by, read_config

    sizes = (data_parallel_size, pipeline_parallel_size, 1, tensor_parallel_size)
    try:
        config = read_config(model)
        options = AscendConfig.of(parse_object(additional_config, "--additional-config"))
        rows = explanation.explain(
            config,
            options,
            Topology(data_parallel_size * pipeline_parallel_size * tensor_parallel_size, *sizes),
            expert_parallel=enable_expert_parallel,
            rank=rank,
            tokens=tokens,
            dtype=dtype,
        )
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if (by := quantised_by(model, config)) is not None:
        note = f"note: the model is quantised ({by}); all figures are those of {dtype} weights and activations"
        typer.echo(note, err=True)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows], indent=2))
        return
    Console().print(_explained_table(rows, rank, tokens))
    typer.echo(
        "decoding steps of this model are captured in graphs, with all options for linear layers; docs/graphs.md names what else switches that off"
    )


def _explained_table(rows: list[Explained], rank: int, tokens: int) -> Table:
    from vllm_ascend.explain import merged

    table = Table(
        box=box.SIMPLE, title=f"rank {rank}, steps of {tokens} tokens", title_justify="left", padding=(0, 1, 0, 0)
    )
    for column in ("layer", "op", "ranks"):
        table.add_column(column, overflow="fold")
    for column in ("n", "launches", "weight", "sent/token", "sent/step"):
        table.add_column(column, justify="right", no_wrap=True)
    for row, count in merged(rows):
        ranks = ",".join(map(str, row.ranks)) if len(row.ranks) <= 4 else f"{row.ranks[0]}..{row.ranks[-1]}"
        name = row.path.removeprefix("model.").removeprefix("layers.*.")
        figures = (row.weight_bytes, row.bytes_per_token, row.bytes_per_step)
        table.add_row(name, row.op or "vLLM's own", ranks, str(count), str(row.launches), *map(_in_units, figures))
    table.add_section()
    sent = sum(row.bytes_per_token for row in rows if row.path != "lm_head")  # whose rows are few
    totals = (sum(row.weight_bytes for row in rows), sent, sum(row.bytes_per_step for row in rows))
    table.add_row(
        "all",
        "(sent: without lm_head)",
        "",
        str(len(rows)),
        str(sum(row.launches for row in rows)),
        *map(_in_units, totals),
    )
    return table


def _in_units(size: float) -> str:
    """Bytes, with the largest unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def main() -> None:
    """Entry point of the `vllm-ascend` command. Exit status 1, without a traceback, where standard output is closed or full."""
    status: object = 0
    if sys.stdout is None:  # closed before the start: nothing is printed, as with Python's print
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        app()
    except SystemExit as stop:
        status = stop.code
    except OSError as error:
        if error.filename is not None:  # of a file, and not of standard output
            sys.exit(f"error: {error.filename}: {error.strerror or error}")
        status = _no_output(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        status = _no_output(error)
    sys.exit(status)  # type: ignore[arg-type]  # what SystemExit had


def _no_output(error: OSError) -> int:
    """Say that standard output cannot be written, unless its reader has closed it, and drop what is left; the exit status."""
    if not isinstance(error, BrokenPipeError):
        print(f"error: standard output cannot be written: {error.strerror or error}", file=sys.stderr)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return 1


if __name__ == "__main__":
    main()
