# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that another one is made of: a folder as Hugging Face transformers writes it."""

import json
import shutil
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
    """
    file = source / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: source={source} must be a directory with a checkpoint")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def copy_beside_weights(source: Path, directory: Path) -> None:
    """Copy what a new checkpoint takes over unchanged: the tokenizer's files, and the defaults of generation."""
    for name in _files_beside_weights(source):
        shutil.copyfile(source / name, directory / name)


def _files_beside_weights(source: Path) -> list[str]:
    return [name for name in _BESIDE_WEIGHTS if (source / name).is_file()]


def find_tensors(source: Path) -> dict[str, str]:
    """Map the name of each tensor in ``source`` to the name of the file that holds it.

    Raises:
        FileNotFoundError: there is neither model.safetensors nor its index.
    """
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return weight_map
    if not single.is_file():
        raise FileNotFoundError(f"source={source} holds neither {single.name} nor {index.name}: it must hold one")
    with module("safetensors").safe_open(single, framework="pt") as weights:
        return dict.fromkeys(weights.keys(), single.name)


def read_tensors(source: Path, weight_files: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Read the tensors ``names`` of ``source``, where ``weight_files`` is of `find_tensors`."""
    safe_open = module("safetensors").safe_open
    tensors = {}
    for file in sorted({weight_files[name] for name in names}):
        with safe_open(source / file, framework="pt") as weights:
            tensors.update({name: weights.get_tensor(name) for name in names if weight_files[name] == file})
    return tensors


def source_sha256(source: Path, weight_files: dict[str, str]) -> str:
    """SHA-256 of everything in ``source`` that a new checkpoint depends on."""
    names = {"config.json", *_files_beside_weights(source), *weight_files.values()}
    return sha256(*(source / name for name in sorted(names)))
