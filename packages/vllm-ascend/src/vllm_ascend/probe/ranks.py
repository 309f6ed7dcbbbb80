# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_ascend.probe.ranks N`: run the cases of two ranks from number N on, and print the JSON lines that `child.py` prints.

The process is rank 0 on the first device. It starts rank 1 on the second one, which ends when its standard input does, and so with rank 0. Either rank
compares what it got; the line of a case has the worse verdict of the two. The processes end after a case that either rank's runtime refuses, for then the
other one may wait for it.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from ascend_comm import TorchGroup
from ascend_moe import Soc
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch defines it without naming it in __all__

from vllm_ascend.probe import cases_ranks, child
from vllm_ascend.probe.cases_ranks import RANKS, Ranks
from vllm_ascend.probe.expected import Case, Result

__all__ = ["main", "worse"]

_ORDER = ("not run", "equal", "within bound", "different", "refused")


def worse(first: Result, second: Result) -> Result:
    """Of the results of rank 0 and rank 1 the one that says more, with the rank where that is rank 1."""
    if _ORDER.index(first.verdict) >= _ORDER.index(second.verdict):
        return first
    return replace(second, detail=f"rank 1: {second.detail}" if second.detail else "rank 1")


@contextmanager
def _joined(rank: int, store: TCPStore) -> Iterator[Ranks]:
    """The groups of both ranks."""
    torch.accelerator.set_device_index(rank)
    dist.init_process_group("hccl", store=store, rank=rank, world_size=RANKS)
    try:
        whole = list(range(RANKS))
        group, mc2 = (
            TorchGroup(dist.new_group(whole, backend="hccl")),
            TorchGroup(dist.new_group(whole, backend="hccl")),
        )
        yield Ranks(group=group, mc2=mc2, soc=Soc.of(importlib.import_module("torch_npu").npu.get_device_name(0)))
    finally:
        dist.destroy_process_group()


def _results(first: int, ranks: Ranks) -> Iterator[tuple[int, Case | Result, Result | None]]:
    """Number and case, before it runs and after it has."""
    for number, build in enumerate(cases_ranks.cases()):
        if number < first:
            continue
        case = build(ranks)
        yield number, case, None
        yield number, case, case if isinstance(case, Result) else child.run(case)


class _Other:
    """Rank 1, as rank 0 sees it.

    Attributes:
        results: of the cases that it has run.
        process: of rank 1.
    """

    def __init__(self, port: int) -> None:
        """Start it as this process was, and tell it the port of the store. What it says to standard error goes to this process's."""
        self.results: queue.Queue[Result] = queue.Queue()
        self.process = subprocess.Popen(
            [*sys.orig_argv, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._running: int | None = None  # number of the case that has begun
        self._begun = threading.Condition()
        self._last = threading.Lock()  # held by whoever prints the last line of this process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def begin(self, number: int, case: Case | Result) -> None:
        """Say that a case begins."""
        with self._begun:
            _print({"begins": number, "kernel": case.kernel, "shape": case.shape})
            self._running = number
            self._begun.notify()

    def _read(self) -> None:
        """Pass its results on. A refusal is the case's result at once, and an early end is one too: rank 0 may wait for it without end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue
            words = json.loads(line)
            number = words.pop("ends")
            result = Result(**words)
            if result.verdict == "refused":
                with self._begun:
                    self._begun.wait_for(lambda: self._running == number)  # noqa: B023  # this call ends before the next line is read
                self.end_with(number, worse(replace(result, verdict="equal"), result))
            self.results.put(result)
        code = self.process.wait()
        if code:
            sys.stderr.write(f"rank 1 ended with {f'signal {-code}' if code < 0 else f'status {code}'}\n")
            sys.stderr.flush()
            os._exit(1)

    def end_after_refusal(self, number: int, result: Result) -> NoReturn:
        """`end_with` the refusal of rank 0, unless rank 1 has ended by itself, which is the reason then: rank 0 was told that its connection is closed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.wait():
            self._reader.join()  # it ends this process
        self.end_with(number, result)

    def end_with(self, number: int, result: Result) -> NoReturn:
        """Print the result of the case that runs, and end both processes."""
        self._last.acquire()
        _print({"ends": number, **asdict(result)})
        os._exit(0)


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _first_rank(first: int) -> None:
    store = TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
    other = _Other(store.port)
    with _joined(0, store) as ranks:
        _print({"cases": len(list(cases_ranks.cases()))})
        for number, case, result in _results(first, ranks):
            if result is None:
                other.begin(number, case)
            elif result.verdict == "refused":
                other.end_after_refusal(number, result)
            else:
                _print({"ends": number, **asdict(worse(result, other.results.get()))})
    other.process.wait()


def _second_rank(first: int, port: int) -> None:
    def end_with_first_rank() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_first_rank, daemon=True).start()
    with _joined(1, TCPStore("127.0.0.1", port, RANKS, is_master=False)) as ranks:
        for number, _, result in _results(first, ranks):
            if result is not None:
                _print({"ends": number, **asdict(result)})


def main() -> None:
    """Entry point of both processes."""
    importlib.import_module("torch_npu")
    with torch.inference_mode():
        if len(sys.argv) > 2:
            _second_rank(int(sys.argv[1]), int(sys.argv[2]))
        elif torch.accelerator.device_count() < RANKS:
            _print({"cases": 0})
        else:
            _first_rank(int(sys.argv[1]))


if __name__ == "__main__":
    main()
