# SPDX-License-Identifier: Apache-2.0
"""The worker's side of the planner: a thread that asks the planner's process and waits for it, so that no step does. No vLLM, no torch.

Legend: M MoE layers, E experts.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import numpy as np
from ascend_eplb import LoadWindow, Placement
from numpy.typing import NDArray

from vllm_ascend.eplb.decide import RebalanceDecision, Rules, placement_after
from vllm_ascend.eplb.planner import HEADER_BYTES, as_decision, as_request

__all__ = ["Planner", "Question"]

_logger = logging.getLogger("vllm.vllm_ascend")
_COMMAND = (sys.executable, "-m", "vllm_ascend.eplb.planner")
_LARGEST_REPLY = 1 << 30
_SECONDS_TO_CLOSE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a plan is asked for.

    Args:
        placed: the placement in force.
        rules: how to plan.
        step_seconds: of a step, measured.
        seconds_per_byte: of a transfer, measured.
    """

    placed: Placement
    rules: Rules
    step_seconds: float
    seconds_per_byte: float


class Planner:
    """Asks a process for plans. All methods return at once.

    The process is started with the first question, and again with the next one after it has ended or taken too long: then the reply is a decision to
    move nothing, whose reason says what went wrong.

    Args:
        window: intervals of load that a plan is made from.
        seconds: that a plan may take.
        command: of the process.
    """

    def __init__(self, *, window: int, seconds: float, command: Sequence[str] = _COMMAND) -> None:
        """Start the thread."""
        self._window, self._seconds, self._command = window, seconds, list(command)
        self._loads: LoadWindow | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: SimpleQueue[tuple[Callable[[], NDArray[np.float64]], Question | None] | None] = SimpleQueue()
        self._replies: SimpleQueue[RebalanceDecision] = SimpleQueue()
        self._closing = False
        self._starts_or_ends = Lock()  # a process is not started when `close` has looked for one to end
        self.failures = 0
        self._thread = Thread(target=self._run, name="expert plans", daemon=True)
        self._thread.start()

    def put(self, load: Callable[[], NDArray[np.float64]], question: Question | None) -> None:
        """Add the load of an interval to the window, and ask for a plan.

        Args:
            load: called in the thread; returns `[M, E]`.
            question: None: ask for nothing.
        """
        self._asked.put((load, question))

    def reply(self) -> RebalanceDecision | None:
        """The decision for the question, once, as soon as there is one. A thread that has ended is a decision to move nothing."""
        try:
            return self._replies.get_nowait()
        except Empty:
            return (
                None if self._thread.is_alive() else RebalanceDecision(reason="failed: the planner's thread has ended")
            )

    def close(self) -> None:
        """End the thread and the process. More calls do nothing."""
        with self._starts_or_ends:
            self._closing = True
        self._asked.put(None)
        self._end_process()
        self._thread.join(_SECONDS_TO_CLOSE)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            load, question = asked
            try:
                self._keep(load())
                if question is not None:
                    self._replies.put(self._ask(question))
            except (
                Exception
            ) as error:  # the steps go on: the reason says what failed, and the next interval tries again
                self._end_process()
                if self._closing:
                    return
                self.failures += 1
                _logger.warning("no plan for the experts of this interval: %s", error)
                if question is not None:
                    self._replies.put(RebalanceDecision(reason=f"failed: {error}"))
        self._end_process()

    def _keep(self, load: NDArray[np.float64]) -> None:
        if self._loads is None:
            self._loads = LoadWindow(layers=len(load), num_experts=load.shape[1], capacity=self._window)
        self._loads.push(load)

    def _ask(self, question: Question) -> RebalanceDecision:
        """The planner's decision, checked. Any exception: there is none, or it is wrong."""
        assert self._loads is not None  # a load comes with each question
        history = self._loads.history()
        request = as_request(
            question.placed, history, question.rules,
            step_seconds=question.step_seconds, seconds_per_byte=question.seconds_per_byte,
        )  # fmt: skip
        deadline = time.monotonic() + self._seconds
        process = self._started()
        assert process.stdin is not None  # pipes were asked for
        assert process.stdout is not None
        _write(process.stdin.fileno(), request, deadline, self._seconds)
        header = _read(process.stdout.fileno(), HEADER_BYTES, deadline, self._seconds)
        size = int.from_bytes(header, "big")
        if size > _LARGEST_REPLY:
            raise ValueError(f"the planner's process announces a reply of {size} bytes, more than {_LARGEST_REPLY}")
        decision = as_decision(_read(process.stdout.fileno(), size, deadline, self._seconds))
        try:
            placement_after(question.placed, decision.transfers)
        except ValueError as error:
            raise ValueError(f"the planner's plan is wrong: {error}") from None
        return decision

    def _started(self) -> subprocess.Popen[bytes]:
        """The process; a new one where the old one has ended."""
        with self._starts_or_ends:
            if self._closing:
                raise RuntimeError("the engine ends")
            if self._process is None or self._process.poll() is not None:
                self._end_process()
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
                )
                for pipe in (self._process.stdin, self._process.stdout):
                    assert pipe is not None
                    os.set_blocking(pipe.fileno(), False)
            return self._process

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _write(pipe: int, data: bytes, deadline: float, seconds: float) -> None:
    left = memoryview(data)
    while left:
        _wait(pipe, deadline, seconds, writes=True)
        try:
            left = left[os.write(pipe, left) :]
        except BrokenPipeError:
            raise RuntimeError("the planner's process has ended") from None


def _read(pipe: int, size: int, deadline: float, seconds: float) -> bytes:
    parts, left = [], size
    while left:
        _wait(pipe, deadline, seconds)
        part = os.read(pipe, min(left, 1 << 20))
        if not part:
            raise RuntimeError("the planner's process has ended")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _wait(pipe: int, deadline: float, seconds: float, *, writes: bool = False) -> None:
    """Wait until a pipe can be read, or written; TimeoutError after the deadline."""
    poll = select.poll()
    poll.register(pipe, select.POLLOUT if writes else select.POLLIN)
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise TimeoutError(f"the planner's process has taken more than {seconds:.0f} seconds")
