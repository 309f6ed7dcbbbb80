# SPDX-License-Identifier: Apache-2.0
"""Command line: `vllm-ascend doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_ascend import doctor as diagnosis

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """VLLM on Ascend NPUs."""


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say whether vLLM will serve on an NPU here, and why not. Exit status 1 when it will not."""
    report = diagnosis.examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        raise typer.Exit(0 if report.active else 1)
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
    raise typer.Exit(0 if report.active else 1)


def main() -> None:
    """Entry point of the `vllm-ascend` command."""
    app()


if __name__ == "__main__":
    main()
