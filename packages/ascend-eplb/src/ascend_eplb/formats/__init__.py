# SPDX-License-Identifier: Apache-2.0
"""Placements and loads on disk: the format follows from the file's ending."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ascend_eplb.formats.arrays import read_arrays, write_arrays
from ascend_eplb.formats.ascend_json import read_ascend_json, write_ascend_json
from ascend_eplb.formats.loads import append_loads, read_loads, write_loads
from ascend_eplb.formats.tensorrt import read_tensorrt_yaml, write_tensorrt_yaml
from ascend_eplb.layers import Numbering, select_layers
from ascend_eplb.placement import Placement

__all__ = ["append_loads", "load_placement", "read_loads", "save_placement", "usual_numbering", "write_loads"]

_KINDS = ".json (Ascend map), .npz or .npy (DeepSeek arrays), .yaml or .yml (TensorRT-LLM)"


def load_placement(
    path: str | Path, *, ranks: int | None = None, num_experts: int = 0, layers: int | Sequence[int] | None = None
) -> Placement:
    """Read a placement, validated as a `Placement` is.

    Args:
        path: a file ending in .json (Ascend map), .npz or .npy (DeepSeek-style arrays) or .yaml/.yml (TensorRT-LLM).
        ranks: R, for formats that do not say it (TensorRT-LLM, foreign arrays). Elsewhere it must agree with the file.
        num_experts: E. 0 takes the highest id + 1.
        layers: the numbers, as the file has them, of the layers wanted, or how many (0..layers-1): see `select_layers`.
            None takes all layers of the file. To find the layers of a model in a file, see `fit_layers`.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: YAML without pyyaml.
        ValueError: an unknown ending or a file that is no valid placement; the message says where in the file.

    Complexity: O(L * S log K).

    Source: the formats' own: vLLM-Ascend's expert map, DeepSeek's EPLB, TensorRT-LLM's load balancer.
    """
    path = Path(path)
    kind = path.suffix.lower()
    try:
        if kind == ".json":
            placement = read_ascend_json(path, num_experts)
        elif kind in (".npz", ".npy"):
            placement = read_arrays(path, ranks, num_experts)
        elif kind in (".yaml", ".yml"):
            placement = read_tensorrt_yaml(path, ranks, num_experts)
        else:
            raise ValueError(f"a placement file ends in {_KINDS}")
        if ranks is not None and placement.ranks != ranks:
            raise ValueError(f"holds {placement.ranks} ranks, ranks={ranks} was asked for")
    except (TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: {error}") from error
    return placement if layers is None else select_layers(placement, layers)


def save_placement(placement: Placement, path: str | Path) -> None:
    """Write a placement in the format of the file's ending (see `load_placement`), atomically.

    A reader sees the old file or the new one, never a part. Reading it back gives an equal placement (TensorRT-LLM's
    format does not hold the number of ranks, which has to be given again).

    Raises:
        OSError: the file cannot be written.
        RuntimeError: YAML without pyyaml.
        ValueError: an unknown ending.

    Complexity: O(L * S), and O(L * E * most replicas) for the padded table in .npz.

    Source: as `load_placement`.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".json":
        write_ascend_json(placement, path)
    elif kind == ".npz":
        write_arrays(placement, path)
    elif kind in (".yaml", ".yml"):
        write_tensorrt_yaml(placement, path)
    else:
        raise ValueError(f"{path}: a placement is written to {_KINDS.replace(' or .npy', '')}")


def usual_numbering(path: str | Path) -> Numbering:
    """How files of this format number layers, for where a file's layers can be read in both ways.

    TensorRT-LLM's YAML holds decoder layer numbers. The readers of the Ascend map take its layers for positions among
    the MoE layers, as rows of arrays are.

    Complexity: O(1). No errors.

    Source: TensorRT-LLM's load balancer; vLLM-Ascend's expert map loader.
    """
    return Numbering.DECODER if Path(path).suffix.lower() in (".yaml", ".yml") else Numbering.POSITION
