# SPDX-License-Identifier: Apache-2.0
"""Run all cases, in processes that may end or fall silent: the table is complete whatever a kernel does to its process."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_ascend.probe.expected import Result

__all__ = ["NEED_RANKS", "run_all"]

COMMAND = (sys.executable, "-m", "vllm_ascend.probe.child")
RANKS_COMMAND = (sys.executable, "-m", "vllm_ascend.probe.ranks")
# What the second command runs, on two devices.
NEED_RANKS = (
    "ascend_comm.all_reduce",
    "ascend_comm.all_gather",
    "ascend_comm.reduce_scatter",
    "ascend_comm.broadcast",
    "ascend_comm.all_to_all",
    "ascend_linear.mm_all_reduce",
    "ascend_linear.mm_reduce_scatter",
    "ascend_moe.mc2_dispatch",
    "ascend_moe.mc2_combine",
)


def run_all(
    silence: float, command: Sequence[str] = COMMAND, ranks_command: Sequence[str] = RANKS_COMMAND
) -> Iterator[Result]:
    """The result of each case, as they come: first those of one device, then those of two.

    Args:
        silence: seconds after which a process that says nothing is ended; its case gets "no answer", and a new process goes on with the next one.
        command: starts the process; the number of the first case to run is added.
        ranks_command: likewise, for the cases of two ranks.

    Raises:
        RuntimeError: the process of one device cannot begin; the message has its last words.
    """
    yield from _run(silence, command)
    found = False
    try:
        for result in _run(silence, ranks_command):
            found = True
            yield result
    except RuntimeError as error:
        found = True
        yield Result(kernel="two ranks", shape="", verdict="no answer", detail=str(error))
    if not found:
        for kernel in NEED_RANKS:
            yield Result(kernel=kernel, shape="", verdict="not run", detail="needs two devices")


def _run(silence: float, command: Sequence[str]) -> Iterator[Result]:
    following, known = 0, 1
    while following < known:
        begun: dict[str, Any] | None = None
        ended_before = following
        with _Process((*command, str(following)), silence) as process:
            for line in process.lines():
                known = line.get("cases", known)
                if "begins" in line:
                    begun = line
                elif "ends" in line:
                    begun, following = None, line.pop("ends") + 1
                    yield Result(**line)
        if begun is not None:
            following = begun["begins"] + 1
            yield Result(kernel=begun["kernel"], shape=begun["shape"], verdict="no answer", detail=process.why)
        elif following == ended_before and known > following:
            raise RuntimeError(f"the process that runs the kernels cannot begin: {process.why}")


class _Process:
    """A child that prints JSON lines.

    Attributes:
        why: how it ended, once it has.
    """

    def __init__(self, command: Sequence[str], silence: float) -> None:
        """Start it."""
        self.why = ""
        self._silence = silence
        self._child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> _Process:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End it if it has not ended."""
        self._child.kill()
        self._child.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self._child.stdout, self._child.stderr):
            assert stream is not None
            stream.close()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it prints that is JSON, until it ends or is silent for too long."""
        while True:
            try:
                line = self._lines.get(timeout=self._silence)
            except queue.Empty:
                self.why = f"silent for {self._silence:g} seconds"
                return
            if line is None:
                break
            if line.startswith("{"):
                yield json.loads(line)
        code = self._child.wait()
        self._readers[1].join()
        last = next((text for text in reversed(self._said) if text.strip()), "").strip()
        self.why = f"the process ended with {f'signal {-code}' if code < 0 else f'status {code}'}" + (
            f": {last}" if last else ""
        )

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            self._said = [*self._said[-20:], line]
