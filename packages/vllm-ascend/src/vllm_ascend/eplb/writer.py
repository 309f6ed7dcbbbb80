# SPDX-License-Identifier: Apache-2.0
"""Threads that write to files, so that no step waits for a disk. No vLLM, no torch.

Legend: M MoE layers, E experts.
"""

from __future__ import annotations

import atexit
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Generic, TypeVar

import numpy as np
from ascend_eplb import append_loads, write_loads

__all__ = ["LoadWriter", "WriterThread"]

_logger = logging.getLogger("vllm.vllm_ascend")
_MOST_ENTRIES = 1000
_MOST_WAITING = 1000  # as many as the file keeps
_SECONDS_TO_CLOSE = 10.0  # where nobody asks for less


_Entry = TypeVar("_Entry")


class WriterThread(ABC, Generic[_Entry]):
    """A thread that is given entries, and writes in their order those that wait together.

    Args:
        path: the file.
        name: of the thread.
        what: is written, for messages.
        most_waiting: entries; 0: any number.
    """

    def __init__(self, path: str, *, name: str, what: str, most_waiting: int = 0) -> None:
        """Start the thread, after what `write` needs has been made."""
        self._path, self._what = path, what
        self._waiting: Queue[_Entry | None] = Queue(most_waiting)
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @abstractmethod
    def write(self, entries: list[_Entry]) -> None:
        """Called in the thread with what has waited; with nothing where the thread is to end."""

    @abstractmethod
    def not_written(self, seconds: float) -> None:
        """Log that `close` gave up after so many seconds."""

    def put(self, entry: _Entry) -> None:
        """Have an entry written; it is left out where too many wait already, or the thread has failed, which the log says."""
        if not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait(entry)
        except Full:
            _logger.error("%r is written too slowly: an entry of %s is left out", self._path, self._what)

    def finish(self, seconds: float) -> None:
        """Write what still waits and end the thread. More calls do nothing.

        Args:
            seconds: the longest that this call may take; what is not written by then is lost, which the log says.
        """
        end = time.monotonic() + seconds
        with suppress(Full):  # the thread makes no progress, which the message says
            self._waiting.put(None, timeout=seconds)
        self._thread.join(max(end - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self.not_written(seconds)

    def _run(self) -> None:
        try:
            goes_on = True
            while goes_on:
                waiting = self._all_waiting()
                goes_on = waiting[-1] is not None
                self.write([entry for entry in waiting if entry is not None])
        except Exception:  # nothing waits for this thread before the end: unless this is logged, nobody learns of it
            _logger.exception("%s are no longer written to %r", self._what, self._path)

    def _all_waiting(self) -> list[_Entry | None]:
        """Everything that waits, one entry at least; None comes last."""
        waiting = [self._waiting.get()]
        while waiting[-1] is not None and not self._waiting.empty():
            waiting.append(self._waiting.get())
        return waiting


class LoadWriter(WriterThread[Callable[[], np.ndarray]]):
    """Writes loads in the order in which they are given, and keeps the last 1000 of them in the file. An entry is called in the thread, and returns `[M, E]`.

    A .jsonl file is appended to, and rewritten when it has 2000 entries; files of other formats are replaced as a whole. What could not be written is
    tried again with the next entry, and at the end. The file of an earlier run is replaced. The thread ends with the interpreter at the latest, after it
    has written what it was given.

    Args:
        path: the file, in a format of `ascend_eplb.write_loads`.
    """

    def __init__(self, path: str) -> None:
        """Start the thread."""
        self._appends = Path(path).suffix.lower() == ".jsonl"
        self._entries: deque[np.ndarray] = deque(maxlen=_MOST_ENTRIES)
        self._unwritten = self._in_file = 0
        super().__init__(path, name="expert loads", what="the experts' loads", most_waiting=_MOST_WAITING)
        atexit.register(self.close)

    def close(self, seconds: float = _SECONDS_TO_CLOSE) -> None:
        """`finish` within so many seconds."""
        atexit.unregister(self.close)
        self.finish(seconds)

    def not_written(self, seconds: float) -> None:
        """See `WriterThread`."""
        _logger.error(
            "the last entries of the experts' loads were not written to %r within %g seconds%s",
            self._path,
            seconds,
            "" if self._appends else "; a .jsonl file is appended to, which takes less time",
        )

    def write(self, entries: list[Callable[[], np.ndarray]]) -> None:
        """See `WriterThread`."""
        self._entries.extend([entry() for entry in entries])
        self._unwritten = min(self._unwritten + len(entries), _MOST_ENTRIES)
        if not self._unwritten:
            return
        try:
            if self._appends and 0 < self._in_file < 2 * _MOST_ENTRIES:
                append_loads(np.stack([*self._entries][-self._unwritten :]), self._path)
                self._in_file += self._unwritten
            else:
                write_loads(np.stack(self._entries), self._path)
                self._in_file = len(self._entries)
            self._unwritten = 0
        except OSError as error:
            _logger.error("the experts' loads cannot be written to %r: %s", self._path, error)
