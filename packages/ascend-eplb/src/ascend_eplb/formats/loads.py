# SPDX-License-Identifier: Apache-2.0
"""Load dumps: .npy/.npz arrays `[L, E]` or `[T, L, E]`, JSON `{"load_history": [{"logical_expert_load": ...}]}` with
numbers `[L][E]` in each step, and JSON lines (.jsonl), each `{"logical_expert_load": ...}`, which can be appended to.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ascend_eplb.formats.arrays import read_numpy
from ascend_eplb.formats.ascend_json import parse_json, read_json
from ascend_eplb.formats.atomic import write_atomically
from ascend_eplb.formats.parse import parse_file
from ascend_eplb.load import as_history
from ascend_eplb.metrics import FloatArray

__all__ = ["append_loads", "read_loads", "write_loads"]


def read_loads(path: str | Path) -> FloatArray:
    """Read a load dump as float64 `[T, L, E]`; a dump of one step has T = 1.

    An .npz is read from its array `load`, or its only one. Of a .jsonl the last line is left out if it has no end: its writer
    was interrupted.

    Raises:
        OSError: the file cannot be read.
        ValueError: an unknown ending, not such a file, or values that a load cannot have (NaN, negative).

    Complexity: O(T * L * E).

    Source: load dumps of vLLM-Ascend (`load_history`) and plain arrays.
    """
    path = Path(path)
    kind = path.suffix.lower()
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": _from_numpy,
        ".npz": _from_numpy,
        ".json": _from_json,
        ".jsonl": _from_json_lines,
    }
    if kind not in readers:
        raise ValueError(f"{path}: a load file ends in .npy, .npz, .json or .jsonl")
    try:
        return as_history(readers[kind](path))
    except (TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_loads(history: ArrayLike, path: str | Path) -> None:
    """Write loads `[T, L, E]` or `[L, E]` atomically, in the format of the file's ending.

    Raises:
        OSError: the file cannot be written.
        TypeError, ValueError: an unknown ending, or a history that `as_history` refuses.

    Complexity: O(T * L * E).

    Source: as `read_loads`.
    """
    path = Path(path)
    history_TLE = as_history(history)
    buffer, kind = io.BytesIO(), path.suffix.lower()
    if kind == ".json":
        buffer.write(b'{"load_history": [' + b", ".join(_steps(history_TLE)) + b"]}")
    elif kind == ".jsonl":
        buffer.writelines(step + b"\n" for step in _steps(history_TLE))
    elif kind == ".npy":
        np.save(buffer, history_TLE)
    elif kind == ".npz":
        np.savez(buffer, load=history_TLE)
    else:
        raise ValueError(f"{path}: loads are written to .npy, .npz, .json or .jsonl")
    write_atomically(path, buffer.getvalue())


def append_loads(history: ArrayLike, path: str | Path) -> None:
    """Add loads `[T, L, E]` or `[L, E]` to a .jsonl file, which is made where there is none.

    A call that fails leaves the whole lines that were there before, so that it can be made again. One that is killed leaves some of its lines,
    and at most one line without an end, which `read_loads` leaves out and the next call removes.

    Raises:
        OSError: the file cannot be written, as on a full disk, or is no regular file; names it.
        TypeError, ValueError: another ending, or what is no load.

    Complexity: O(T * L * E), whatever the file's length.

    Source: JSON lines, https://jsonlines.org.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"{path}: loads are appended to .jsonl alone")
    steps = b"".join(step + b"\n" for step in _steps(as_history(history)))
    try:
        with path.open("a+b", buffering=0) as file:  # a buffer would be written once more when the file is closed
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "Not a regular file")
            end = _end_of_lines(file)
            file.truncate(end)
            try:
                _write_all(file, steps)
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _write_all(file: FileIO, content: bytes) -> None:
    """Write to the disk: what does not fit on it may fail as late as that."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def _end_of_lines(file: FileIO) -> int:
    """Bytes of a file up to the end of its last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - 65536, 0)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def _steps(history_TLE: FloatArray) -> Iterator[bytes]:
    """Each step as JSON. One at a time: to encode a long history at once would keep every other thread of the process waiting."""
    return (json.dumps({"logical_expert_load": step.tolist()}).encode() for step in history_TLE)


def _from_numpy(path: Path) -> NDArray[Any]:
    arrays = read_numpy(path)
    if "load" in arrays:
        return arrays["load"]
    if len(arrays) != 1:
        raise ValueError(f"has the arrays {', '.join(arrays)}, but none is called 'load'")
    return next(iter(arrays.values()))


def _from_json(path: Path) -> list[Any]:
    document = read_json(path)
    steps = document.get("load_history") if isinstance(document, dict) else None
    if not isinstance(steps, list) or not steps:
        raise ValueError("$.load_history must be a list of steps")
    for index, step in enumerate(steps):
        if not isinstance(step, dict) or "logical_expert_load" not in step:
            raise ValueError(f"$.load_history[{index}].logical_expert_load is missing")
    return [step["logical_expert_load"] for step in steps]


def _from_json_lines(path: Path) -> list[Any]:
    steps = parse_file(path, "JSON lines", _parse_lines)
    if not steps:
        raise ValueError("has no whole line")
    for number, step in enumerate(steps, 1):
        if not isinstance(step, dict) or "logical_expert_load" not in step:
            raise ValueError(f"line {number}: logical_expert_load is missing")
    return [step["logical_expert_load"] for step in steps]


def _parse_lines(content: bytes) -> list[Any]:
    """Every line that has an end, parsed."""
    steps = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            steps.append(parse_json(line))
        except RecursionError as error:
            raise ValueError(f"line {number}: nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return steps
