# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-style arrays: `phy2log` `[L, S]`, `log2phy` `[L, E, max]` padded with -1, `counts` `[L, E]`, in one .npz."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.formats.atomic import write_atomically
from ascend_eplb.maps import replica_table
from ascend_eplb.placement import IntArray, Placement, from_physical_to_logical

__all__ = ["padded_log2phy", "read_arrays", "write_arrays"]


def padded_log2phy(placement: Placement) -> IntArray:
    """int32 `[L, E, max]`: all physical ids of each expert, ascending, padded with -1. O(L * (S + E * max))."""
    order_LS, start_LE, count_LE = replica_table(placement)
    turn_M = np.arange(int(count_LE.max()))
    index_LEM = np.minimum(start_LE[:, :, None] + turn_M, placement.slots - 1)
    flat = np.take_along_axis(order_LS, index_LEM.reshape(placement.layers, -1), axis=1).reshape(index_LEM.shape)
    return np.where(turn_M < count_LE[:, :, None], flat, np.int32(-1))


def write_arrays(placement: Placement, path: Path) -> None:
    """Write the three arrays, with `ranks` and `layer_ids` beside them, atomically."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        phy2log=placement.physical_to_logical.reshape(placement.layers, -1),
        log2phy=padded_log2phy(placement),
        counts=placement.replicas,
        ranks=np.int32(placement.ranks),
        layer_ids=np.array(placement.layer_ids, dtype=np.int32),
    )
    write_atomically(path, buffer.getvalue())


def read_arrays(path: Path, ranks: int | None = None, num_experts: int = 0) -> Placement:
    """Read an .npz with `phy2log` (and, where present, agreeing `log2phy` and `counts`), or a bare .npy.

    Arrays `[L, R, K]` say R themselves, `[L, S]` need `ranks` from the file or the caller.

    Raises:
        OSError: the file cannot be read.
        ValueError: no NumPy file, arrays missing or disagreeing, `ranks` unknown, or an invalid placement.
    """
    arrays = _read(path)
    if "phy2log" not in arrays:
        raise ValueError(f"{path}: has no array 'phy2log', only {', '.join(sorted(arrays)) or 'nothing'}")
    ids = arrays["phy2log"]
    if "counts" in arrays and not num_experts:
        num_experts = int(arrays["counts"].shape[-1])
    layer_ids = tuple(int(layer) for layer in arrays.get("layer_ids", np.array(())).ravel())
    try:
        if ids.ndim == 3:
            placement = Placement(ids, num_experts, layer_ids)
        else:
            known = int(arrays["ranks"]) if "ranks" in arrays else ranks
            if known is None:
                raise ValueError(f"phy2log of shape {ids.shape} does not say how many ranks there are: give ranks")
            placement = from_physical_to_logical(ids, ranks=known, num_experts=num_experts, layer_ids=layer_ids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    _check_derived(path, placement, arrays)
    return placement


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"phy2log": loaded}
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a NumPy file of plain arrays: {error}") from error


def _check_derived(path: Path, placement: Placement, arrays: dict[str, NDArray[Any]]) -> None:
    counts = arrays.get("counts")
    if counts is not None and not np.array_equal(counts.reshape(-1, counts.shape[-1]), placement.replicas):
        raise ValueError(f"{path}: 'counts' does not agree with 'phy2log'")
    table = arrays.get("log2phy")
    if table is None:
        return
    expected = padded_log2phy(placement)
    ordered = np.sort(np.where(table < 0, np.iinfo(np.int32).max, table), axis=-1)[..., : expected.shape[-1]]
    wanted = np.where(expected < 0, np.iinfo(np.int32).max, expected)
    extra = (table >= 0).sum() != (expected >= 0).sum()
    if extra or not np.array_equal(ordered.reshape(-1), wanted.reshape(-1)):
        raise ValueError(f"{path}: 'log2phy' does not agree with 'phy2log'")
