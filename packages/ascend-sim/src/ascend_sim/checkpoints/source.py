# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that another one is made of: a folder as Hugging Face transformers writes it."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ascend_sim.checkpoints.folder import module, sha256

__all__ = ["copy_beside_weights", "find_tensors", "read_config", "read_tensors", "source_sha256"]

_BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def read_config(source: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    file = source / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: source={source} must be a directory with a checkpoint")
    return _read_object(file)


def _read_object(file: Path) -> dict[str, Any]:
    """The one JSON object in a file. ValueError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply to be read as JSON") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must be one JSON object, got {type(found).__name__}")
    return found


def copy_beside_weights(source: Path, directory: Path) -> None:
    """Copy what a new checkpoint takes over unchanged: the tokenizer's files, and the defaults of generation."""
    for name in _files_beside_weights(source):
        shutil.copyfile(source / name, directory / name)


def _files_beside_weights(source: Path) -> list[str]:
    return [name for name in _BESIDE_WEIGHTS if (source / name).is_file()]


def find_tensors(source: Path) -> dict[str, str]:
    """Map the name of each tensor in ``source`` to the name of the file that holds it.

    Raises:
        FileNotFoundError: there is neither model.safetensors nor its index, or a file that the index names is missing.
        ValueError: the index or the file is damaged.
    """
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"source={source} holds neither {single.name} nor {index.name}: it must hold one")
        with _open(single) as weights:
            return dict.fromkeys(weights.keys(), single.name)
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
        raise ValueError(f"{index} must have a weight_map: for each tensor the name of a file beside it")
    for file in sorted(set(weight_map.values())):
        if not (source / file).is_file():
            raise FileNotFoundError(
                f"{source / file} is missing, which {index.name} names: source={source} is incomplete"
            )
    return weight_map


def _is_file_name(text: object) -> bool:
    return isinstance(text, str) and text not in ("", ".", "..") and Path(text).name == text


def read_tensors(source: Path, weight_files: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Read the tensors ``names`` of ``source``, where ``weight_files`` is of `find_tensors`.

    Raises:
        ValueError: a file is damaged, or lacks a tensor.
    """
    tensors = {}
    for file in sorted({weight_files[name] for name in names}):
        with _open(source / file) as weights:
            tensors.update({name: weights.get_tensor(name) for name in names if weight_files[name] == file})
    return tensors


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A safetensors file. ValueError where it is damaged, or does not have what is asked of it."""
    safetensors = module("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as weights:
            yield weights
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}. Make or copy the checkpoint again") from None


def source_sha256(source: Path, weight_files: dict[str, str]) -> str:
    """SHA-256 of everything in ``source`` that a new checkpoint depends on."""
    names = {"config.json", *_files_beside_weights(source), *weight_files.values()}
    return sha256(*(source / name for name in sorted(names)))
