# SPDX-License-Identifier: Apache-2.0
"""`vllm-ascend eplb status URL`: the metrics of dynamic EPLB of a server, as text and as a heat map. No vLLM, no torch."""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_ascend.eplb.metrics import PREFIX

__all__ = ["Shown", "app", "fetch", "read"]

app = typer.Typer(no_args_is_help=True, help="Experts that move while an engine runs.")
_TIMEOUT = 10.0  # seconds
# Load of a rank / mean from which on a cell has this colour. A step waits for the fullest rank.
_COLOURS = ((1.5, "white on red"), (1.2, "black on dark_orange"), (1.05, "black on yellow"), (0.0, "black on green"))
_TEXTS = {
    "balancedness": "balancedness now (1 is best)",
    "planned_from": "balancedness before the last plan",
    "predicted": "balancedness predicted by it",
    "intervals_total": "intervals of load",
    "rebalances_total": "rebalances",
    "moves_total": "slots with other weights",
    "bytes_moved_total": "bytes sent over all ranks",
    "background_seconds_total": "seconds of rebalances, beside the steps",
    "waited_seconds_total": "seconds that steps waited",
    "longest_wait_seconds": "seconds that one step waited at most",
    "failures_total": "plans that failed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a server's metrics say of dynamic EPLB.

    Args:
        numbers: name without the prefix -> value.
        dropped: reason -> plans that moved nothing.
        load: (MoE layers, ranks, load of the fullest of them / mean of all ranks), in the order of the map.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    load: list[tuple[str, str, float]] = field(default_factory=list)


def fetch(url: str) -> str:
    """The text at the /metrics of a server.

    Args:
        url: of the server, with /metrics or without.

    Raises:
        ValueError: it is no URL, nobody answers, or something else than metrics comes; says which.
    """
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{url!r} must be the URL of a server, such as http://localhost:8000")
    path = parts.path.rstrip("/")
    asked = parts._replace(path=path if path.endswith("/metrics") else f"{path}/metrics").geturl()
    try:
        with urllib.request.urlopen(asked, timeout=_TIMEOUT) as answer:  # the scheme was checked
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        error.close()  # it is the answer as well
        raise ValueError(
            f"{asked} answers {error.code} {error.reason}: no vLLM server, or one without metrics"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{asked} cannot be read: {reason}; give the URL of a server that runs") from None


def read(text: str) -> Shown:
    """What metrics say of dynamic EPLB.

    Raises:
        ValueError: they are no metrics, or say nothing of it.
    """
    shown = Shown()
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as error:
        raise ValueError(f"the answer of the server is no text of metrics: {error}") from None
    for sample in samples:
        if not sample.name.startswith(PREFIX) or sample.name.endswith("_created"):
            continue
        name = sample.name.removeprefix(PREFIX)
        if name == "rank_load":
            shown.load.append((sample.labels["layers"], sample.labels["ranks"], sample.value))
        elif name == "plans_dropped_total":
            shown.dropped[sample.labels["reason"]] = sample.value
        else:
            shown.numbers[name] = sample.value
    if not shown.numbers:
        raise ValueError(
            "the server has no metrics of dynamic EPLB yet: they appear after the first interval of load, with eplb_config.dynamic_eplb"
        )
    shown.load.sort(key=lambda cell: (_first(cell[0]), _first(cell[1])))
    return shown


def _first(span: str) -> int:
    """The first number of "4-7", or of "4"."""
    return int(span.partition("-")[0])


@app.callback()
def _group() -> None:
    """Experts that move while an engine runs."""


@app.command()
def status(
    url: Annotated[str, typer.Argument(help="The server, such as http://localhost:8000.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what dynamic EPLB of a running server has done, and how full its ranks are. Exit status 1 when the server cannot say it."""
    try:
        shown = read(fetch(url))
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        cells = [{"layers": layers, "ranks": ranks, "load": load} for layers, ranks, load in shown.load]
        typer.echo(json.dumps({**shown.numbers, "plans_dropped": shown.dropped, "rank_load": cells}, indent=2))
        return
    console = Console()
    console.print(_numbers(shown))
    if shown.load:
        console.print(_heat_map(shown.load))


def _numbers(shown: Shown) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, title="dynamic EPLB", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, text in _TEXTS.items():
        if name in shown.numbers:
            table.add_row(text, _in_digits(shown.numbers[name]))
    for reason, count in sorted(shown.dropped.items()):
        table.add_row(Text(f"plans that moved nothing: {reason}"), _in_digits(count))
    return table


def _in_digits(value: float) -> str:
    """A whole number with separators, another one with three digits after the point."""
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) and value > 1 else f"{value:.3f}".removesuffix(".000")  # fmt: skip


def _heat_map(load: list[tuple[str, str, float]]) -> Table:
    """A row for each group of MoE layers, a column for each group of ranks."""
    ranks = sorted({cell[1] for cell in load}, key=_first)
    cells = {(layers, rank): value for layers, rank, value in load}
    table = Table(
        box=box.SIMPLE, padding=0, title="load of a rank / mean, last interval (rows: MoE layers, columns: ranks)",
        title_justify="left",
    )  # fmt: skip
    table.add_column("", justify="right")
    for rank in ranks:
        table.add_column(rank, justify="center")
    for layers in sorted({cell[0] for cell in load}, key=_first):
        row = [Text(f"{layers} ")]
        for rank in ranks:
            value = cells.get((layers, rank), math.nan)
            colour = next((name for least, name in _COLOURS if value >= least), "")
            row.append(Text(f" {value:4.2f} ", style=colour))
        table.add_row(*row)
    return table
