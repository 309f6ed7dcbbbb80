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
from ascend_eplb.formats.parse import parse_file
from ascend_eplb.limits import MOST_BYTES, check_limit
from ascend_eplb.maps import replica_table
from ascend_eplb.placement import IntArray, Placement, from_physical_to_logical

__all__ = ["padded_log2phy", "read_arrays", "read_numpy", "write_arrays"]


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
    arrays = read_numpy(path)
    ids = arrays.get("phy2log", arrays.get(""))
    if ids is None:
        raise ValueError(f"has no array 'phy2log', only {', '.join(sorted(arrays)) or 'nothing'}")
    for name in ("ranks", "layer_ids", "counts", "log2phy"):
        if name in arrays and not np.issubdtype(arrays[name].dtype, np.integer):
            raise ValueError(f"'{name}' must hold integers, not {arrays[name].dtype}")
    if "ranks" in arrays and arrays["ranks"].size != 1:
        raise ValueError(f"'ranks' must be one number, not of shape {arrays['ranks'].shape}")
    ranks = int(arrays["ranks"].item()) if "ranks" in arrays else ranks
    layer_ids = tuple(arrays["layer_ids"].ravel().tolist()) if "layer_ids" in arrays else ()
    if ids.ndim == 3:
        placement = Placement(ids, num_experts, layer_ids)
    elif ranks is None:
        raise ValueError(f"phy2log of shape {ids.shape} does not say how many ranks there are: give ranks")
    else:
        placement = from_physical_to_logical(ids, ranks=ranks, num_experts=num_experts, layer_ids=layer_ids)
    _check_derived(placement, arrays)
    return placement


def read_numpy(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz by name; the one of an .npy under the name "".

    Raises:
        OSError, ValueError: as `parse_file`, also for arrays of Python objects, which could run code when loaded.
    """
    return parse_file(path, "a NumPy file of plain arrays", _parse)


def _parse(content: bytes) -> dict[str, NDArray[Any]]:
    if content.startswith(b"\x93NUMPY"):
        return {"": np.asarray(np.load(io.BytesIO(content), allow_pickle=False))}
    if not content.startswith(b"PK"):
        raise ValueError("it starts neither as an array nor as an archive of arrays")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # which inflates no member beyond the size that it declares
        size = sum(member.file_size for member in archive.infolist())
    check_limit("the archive is too large when unpacked", size, MOST_BYTES, "bytes")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: np.asarray(arrays[name]) for name in arrays.files}


def _check_derived(placement: Placement, arrays: dict[str, NDArray[Any]]) -> None:
    """Refuse `counts` and `log2phy` that say something else than the placement; padding may be longer."""
    one_layer = placement.layers == 1
    counts, table = arrays.get("counts"), arrays.get("log2phy")
    if counts is not None and not np.array_equal(counts[None] if one_layer and counts.ndim == 1 else counts,
                                                 placement.replicas):  # fmt: skip
        raise ValueError("'counts' does not agree with 'phy2log'")
    if table is None:
        return
    table = table[None] if one_layer and table.ndim == 2 else table
    expected = padded_log2phy(placement)
    if table.ndim == 3 and table.shape[:2] == expected.shape[:2]:
        ordered = -np.sort(-table, axis=2)[:, :, : expected.shape[2]]  # descending: the padding comes last
        agrees = np.array_equal(ordered, -np.sort(-expected, axis=2)) and (table >= 0).sum() == (expected >= 0).sum()
    else:
        agrees = False
    if not agrees:
        raise ValueError("'log2phy' does not agree with 'phy2log'")
