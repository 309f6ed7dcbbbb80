# SPDX-License-Identifier: Apache-2.0
"""A thread that writes recorded loads to a file, so that no step waits for a disk. No vLLM, no torch.

Legend: M MoE layers, E experts.
"""

from __future__ import annotations

import atexit
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread

import numpy as np
from ascend_eplb import append_loads, write_loads

__all__ = ["LoadWriter"]

_logger = logging.getLogger("vllm.vllm_ascend")
_MOST_ENTRIES = 1000
_MOST_WAITING = 1000  # as many as the file keeps
_SECONDS_TO_CLOSE = 10.0  # where nobody asks for less


class LoadWriter:
    """Writes entries in the order in which they are given, and keeps the last 1000 of them in the file.

    A .jsonl file is appended to, and rewritten when it has 2000 entries; files of other formats are replaced as a whole. Entries that wait are
    written together. What could not be written is tried again with the next entry, and at the end. The file of an earlier run is replaced.

    Args:
        path: the file, in a format of `ascend_eplb.write_loads`.
    """

    def __init__(self, path: str) -> None:
        """Start the thread. It ends with the interpreter at the latest, after it has written what it was given."""
        self._path = path
        self._appends = Path(path).suffix.lower() == ".jsonl"
        self._waiting: Queue[Callable[[], np.ndarray] | None] = Queue(_MOST_WAITING)
        self._entries: deque[np.ndarray] = deque(maxlen=_MOST_ENTRIES)
        self._unwritten = self._in_file = 0
        self._thread = Thread(target=self._run, name="expert loads", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, entry: Callable[[], np.ndarray]) -> None:
        """Have an entry written; it is left out where too many wait already, or the thread has failed, which the log says.

        Args:
            entry: called in the thread, returns loads `[M, E]`.
        """
        if not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait(entry)
        except Full:
            _logger.error("%r is written too slowly: an entry of the experts' loads is left out", self._path)

    def close(self, seconds: float = _SECONDS_TO_CLOSE) -> None:
        """Write what still waits and end the thread. More calls do nothing.

        Args:
            seconds: the longest that this call may take; what is not written by then is lost, which the log says.
        """
        atexit.unregister(self.close)
        end = time.monotonic() + seconds
        with suppress(Full):  # the thread makes no progress, which the message below says
            self._waiting.put(None, timeout=seconds)
        self._thread.join(max(end - time.monotonic(), 0.0))
        if self._thread.is_alive():
            _logger.error(
                "the last entries of the experts' loads were not written to %r within %g seconds%s",
                self._path,
                seconds,
                "" if self._appends else "; a .jsonl file is appended to, which takes less time",
            )

    def _run(self) -> None:
        try:
            goes_on = True
            while goes_on:
                waiting = self._all_waiting()
                goes_on = waiting[-1] is not None
                new = [entry() for entry in waiting if entry is not None]
                self._entries.extend(new)
                self._unwritten = min(self._unwritten + len(new), _MOST_ENTRIES)
                if self._unwritten:
                    self._write()
        except Exception:  # nothing waits for this thread before the end: unless this is logged, nobody learns of it
            _logger.exception("the experts' loads are no longer written to %r", self._path)

    def _all_waiting(self) -> list[Callable[[], np.ndarray] | None]:
        """Everything that waits, one entry at least; None comes last."""
        waiting = [self._waiting.get()]
        while waiting[-1] is not None and not self._waiting.empty():
            waiting.append(self._waiting.get())
        return waiting

    def _write(self) -> None:
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
