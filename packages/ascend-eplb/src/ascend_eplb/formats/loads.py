# SPDX-License-Identifier: Apache-2.0
"""Load dumps: .npy/.npz arrays `[L, E]` or `[T, L, E]`, JSON `{"load_history": [{"logical_expert_load": ...}]}` with
numbers `[L][E]` in each step, and JSON lines (.jsonl), each `{"logical_expert_load": ...}`, which can be appended to.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ascend_eplb.formats.arrays import read_numpy
from ascend_eplb.formats.ascend_json import read_json
from ascend_eplb.formats.atomic import write_atomically
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

    An interrupted call leaves at most one line without an end, which `read_loads` leaves out and the next call removes.

    Raises:
        OSError: the file cannot be written.
        TypeError, ValueError: another ending, or what is no load.

    Complexity: O(T * L * E), whatever the file's length.

    Source: JSON lines, https://jsonlines.org.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"{path}: loads are appended to .jsonl alone")
    steps = b"".join(step + b"\n" for step in _steps(as_history(history)))
    with path.open("a+b") as file:
        file.truncate(_end_of_lines(file))
        file.write(steps)


def _end_of_lines(file: BinaryIO) -> int:
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
    loads = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            step = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(step, dict) or "logical_expert_load" not in step:
            raise ValueError(f"line {number}: logical_expert_load is missing")
        loads.append(step["logical_expert_load"])
    if not loads:
        raise ValueError("has no whole line")
    return loads
