# SPDX-License-Identifier: Apache-2.0
"""What `vllm-ascend doctor --report FILE` writes: a text to attach to an issue."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_ascend.doctor import Report
from vllm_ascend.probe.expected import Result

__all__ = ["text", "write"]


def text(report: Report, environment: Mapping[str, str], results: Sequence[Result] | None) -> str:
    """The report in Markdown.

    Args:
        report: what the doctor found.
        environment: variables and values that may be shown.
        results: of the probe; None where it did not run.
    """
    kind = "simulated" if report.simulated else "real"
    parts = [
        "# vllm-ascend doctor",
        "",
        f"plugin: {'active' if report.active else f'inactive because {report.reason}'}",
        "",
    ]
    parts += [f"* {note}" for note in report.notes] + ([""] if report.notes else [])
    parts += _table(
        ("what", "version"),
        [*report.versions.items(), ("devices", f"{len(report.devices)} ({kind}): {', '.join(report.devices)}")],
    )
    parts += ["", "## Environment", "", *_table(("variable", "value"), sorted(environment.items()))]
    if results is not None:
        parts += ["", "## Kernels", "", summary(results), ""]
        parts += _table(
            ("kernel", "call", "verdict", "detail"), [(r.kernel, r.shape, r.verdict, r.detail) for r in results]
        )
    return "\n".join(parts) + "\n"


def summary(results: Sequence[Result]) -> str:
    """How many results of each verdict, in one line."""
    counts = Counter(result.verdict for result in results)
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write(path: Path, content: str) -> None:
    """Replace the file as a whole: a reader finds the old text or the new one, and never a part.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
