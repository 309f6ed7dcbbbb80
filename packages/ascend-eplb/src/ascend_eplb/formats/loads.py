# SPDX-License-Identifier: Apache-2.0
"""Load dumps: .npy/.npz arrays `[L, E]` or `[T, L, E]`, and JSON `{"load_history": [{"logical_expert_load": ...}]}`
with numbers `[L][E]` in each step.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ascend_eplb.formats.arrays import read_numpy
from ascend_eplb.formats.ascend_json import read_json
from ascend_eplb.formats.atomic import write_atomically
from ascend_eplb.load import as_history
from ascend_eplb.metrics import FloatArray

__all__ = ["read_loads", "write_loads"]


def read_loads(path: str | Path) -> FloatArray:
    """Read a load dump as float64 `[T, L, E]`; a dump of one step has T = 1.

    An .npz is read from its array `load`, or its only one.

    Raises:
        OSError: the file cannot be read.
        ValueError: an unknown ending, not such a file, or values that a load cannot have (NaN, negative).

    Complexity: O(T * L * E).

    Source: load dumps of vLLM-Ascend (`load_history`) and plain arrays.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".npy", ".npz", ".json"):
        raise ValueError(f"{path}: a load file ends in .npy, .npz or .json")
    try:
        return as_history(_from_json(path) if kind == ".json" else _from_numpy(path))
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
        steps = [{"logical_expert_load": step} for step in history_TLE.tolist()]
        buffer.write(json.dumps({"load_history": steps}).encode())
    elif kind == ".npy":
        np.save(buffer, history_TLE)
    elif kind == ".npz":
        np.savez(buffer, load=history_TLE)
    else:
        raise ValueError(f"{path}: loads are written to .npy, .npz or .json")
    write_atomically(path, buffer.getvalue())


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
