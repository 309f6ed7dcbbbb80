# SPDX-License-Identifier: Apache-2.0
"""A W8A8 checkpoint made of a float one, in the format of Huawei's ModelSlim ("AscendV1")."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascend_sim.checkpoints.folder import (
    RECIPE_FORMAT,
    Progress,
    already_there,
    module,
    new_directory,
    silent,
    write_json,
)
from ascend_sim.checkpoints.source import (
    copy_beside_weights,
    find_tensors,
    read_config,
    read_tensors,
    source_sha256,
)

__all__ = ["quantise"]

_TYPE = "W8A8_DYNAMIC"
_DESCRIPTION = "quant_model_description.json"
# Linear layers and experts of Llama, Mixtral, Qwen, DeepSeek, GLM. Embeddings, LM heads, norms and routers are none of them.
_LINEAR = re.compile(r"\.(?P<layer>\w+_proj|kv_a_proj_with_mqa|experts\.\d+\.w[123])\.weight$")
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)(\.weight)?")


def quantise(
    source: Path, directory: Path, *, keep_float: Sequence[str] = ("kv_b_proj",), progress: Progress | None = None
) -> Path:
    """Make a W8A8_DYNAMIC checkpoint in ModelSlim's format of the float checkpoint ``source``.

    The weight w [out, in] of a linear layer or expert becomes int8, with one float32 scale for each output channel:
    ``w ~ weight * weight_scale``, ``weight_scale = max|w| / 127``. ``weight_offset`` is 0. There is no calibration, and
    none is needed: activations get a scale for each token when they come. Everything else is kept as it is. The
    same arguments give the same bytes. Each file of ``source`` becomes one, so that memory holds one file.

    Args:
        source: a Hugging Face checkpoint (config.json, safetensors), experts by themselves ("experts.0.up_proj").
        directory: where the new checkpoint shall be; absent, empty, or made by an earlier call.
        keep_float: last components of layers that are not quantised. By default the one that latent attention
            absorbs into others.
        progress: told of the stage "quantise", in files.

    Returns:
        ``directory``.

    Raises:
        ValueError: ``source`` is quantised already, has its experts in one tensor, or has nothing to quantise.
        FileNotFoundError: ``source`` has no config.json or no safetensors.
        FileExistsError: ``directory`` holds something else.
        RuntimeError: a Python package is missing.
    """
    report = progress or silent
    config = read_config(source)
    if config.get("quantization_config") or (source / _DESCRIPTION).exists():
        raise ValueError(f"source={source} is quantised already: it must hold a float checkpoint")
    weight_files = find_tensors(source)
    quantised = _to_quantise(weight_files, keep_float, source)
    recipe = {
        "format": RECIPE_FORMAT,
        "model": "quantise",
        "source_sha256": source_sha256(source, weight_files),
        "type": _TYPE,
        "keep_float": sorted(keep_float),
    }
    if already_there(directory, recipe):
        return directory
    with new_directory(directory, recipe) as draft:
        copy_beside_weights(source, draft)
        write_json(draft / "config.json", config)
        names = _write_shards(source, weight_files, quantised, draft, report)
        types = {
            name: _TYPE if f"{name.rpartition('.')[0]}.weight" in quantised and not name.endswith(".bias") else "FLOAT"
            for name in sorted(names)
        }
        description = {"model_quant_type": _TYPE, "version": "1.0.0", "group_size": 0}
        write_json(draft / _DESCRIPTION, description | types)
    return directory


def _to_quantise(weight_files: dict[str, str], keep_float: Sequence[str], source: Path) -> set[str]:
    """Names of the weights that become int8."""
    found = set()
    for name in weight_files:
        if _FUSED_EXPERTS.search(name):
            raise ValueError(
                f"source={source} has its experts in one tensor, {name}: each must have tensors of its own"
            )
        match = _LINEAR.search(name)
        if match and match["layer"].rpartition(".")[2] not in keep_float:
            found.add(name)
    if not found:
        raise ValueError(f"source={source} has no linear layers to quantise, such as one named *_proj")
    return found


def _write_shards(
    source: Path, weight_files: dict[str, str], quantised: set[str], folder: Path, report: Progress
) -> list[str]:
    """Write the tensors, a file for each of the source's, and an index where there are several; returns their names."""
    save_file = module("safetensors.torch").save_file
    files = sorted(set(weight_files.values()))
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, file in enumerate(files):
        report("quantise", number, len(files))
        here = [name for name, where in weight_files.items() if where == file]
        tensors = {}
        for name, tensor in read_tensors(source, weight_files, here).items():
            tensors.update(_quantised_weight(name, tensor) if name in quantised else {name: tensor})
        part = "" if len(files) == 1 else f"-{number + 1:05}-of-{len(files):05}"
        target = f"quant_model_weights{part}.safetensors"
        save_file(tensors, folder / target, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, target))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "quant_model_weights.safetensors.index.json", index)
    report("quantise", len(files), len(files))
    return list(weight_map)


def _quantised_weight(name: str, weight: Any) -> dict[str, Any]:
    """The tensors by which the weight ``name`` [out, in] is stored: int8 [out, in], and scale and offset [out, 1]."""
    torch = module("torch")
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / 127.0
    scale = torch.where(scale == 0.0, 1.0, scale)  # a channel of zeros
    rounded = (wide / scale).round().clamp(-127, 127).to(torch.int8)
    return {name: rounded, f"{name}_scale": scale, f"{name}_offset": torch.zeros_like(scale)}
