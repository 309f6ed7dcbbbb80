# SPDX-License-Identifier: Apache-2.0
"""The files of a quantised checkpoint: where its description is, and which tensors it really has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_ascend.json_object import parse_object
from vllm_ascend.quantization.description import Description, describes_tensors, needed_tensors

__all__ = ["FILE", "description_files", "has_description", "lacking", "read_description"]

FILE = "quant_model_description.json"
_OLDER = "quant_model_description_*.json"  # ModelSlim's names until 2025 end with the type: _w8a8, _w8a8_dynamic
_OLDER_ON_A_HUB = ("quant_model_description_w8a8.json", "quant_model_description_w8a8_dynamic.json")


def description_files(model: str) -> list[str]:
    """Names of the descriptions in a local folder, the present name first; empty for a name on a hub."""
    folder = Path(model)
    if not folder.is_dir():
        return []
    return [FILE] * (folder / FILE).is_file() + sorted(path.name for path in folder.glob(_OLDER))


def has_description(model: str, hf_config: Any) -> bool:
    """Whether a local folder has a description, in a file or in its config.json."""
    return bool(description_files(model)) or (Path(model).is_dir() and _in_config(hf_config) is not None)


def read_description(model: str, revision: str | None, hf_config: Any) -> tuple[dict[str, Any], str]:
    """The description of a model, and its name for messages.

    Args:
        model: a folder, or a name on a hub.
        revision: on the hub.
        hf_config: the model's config. MindIE's tools put the description in there, as `quantization_config`.

    Raises:
        ValueError: there is none, there are several, or it is not one JSON object.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_bytes

    found = {}
    for name in description_files(model) if Path(model).is_dir() else (FILE, *_OLDER_ON_A_HUB):
        if (content := get_hf_file_bytes(name, model, revision)) is not None:
            if name == FILE:
                return parse_object(content, f"{name} of {model!r}", unique=True), name
            found[name] = content
    if len(found) > 1:
        raise ValueError(
            f"{model!r} has several descriptions of its quantisation ({', '.join(found)}); leave the one of its weights, as {FILE}"
        )
    for name, content in found.items():
        return parse_object(content, f"{name} of {model!r}", unique=True), name
    if (inside := _in_config(hf_config)) is not None:
        return inside, "quantization_config of config.json"
    raise ValueError(
        f"--quantization ascend: {model!r} has no {FILE}, as checkpoints quantised by ModelSlim have; "
        "leave the option out for a float checkpoint"
    )


def lacking(description: Description, model: str, decoder_layers: int) -> Iterator[str]:
    """Findings for tensors of quantised layers that the safetensors files of a local folder lack, or have in another shape.

    Args:
        description: of the checkpoint.
        model: its folder. Of a name on a hub, and of a folder without such files, nothing is known.
        decoder_layers: the model's; later ones (drafts) are described by some checkpoints that do not have them.
    """
    shapes = _shapes(Path(model))
    if not shapes:
        return
    absent, grouped = [], []
    for name in needed_tensors(description.types):
        if _layer_index(name) >= decoder_layers:
            continue
        shape = shapes.get(name)
        if shape is None:
            absent.append(name)
        elif name.endswith(".weight_scale") and len(shape) == 2 and shape[1] != 1:
            grouped.append(f"{name!r} {list(shape)}")
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        yield f"the weight files of {model!r} lack {len(absent)} tensors that {description.source} names: {', '.join(map(repr, absent[:5]))}{more}"
    if grouped:
        yield (
            f"the weight files of {model!r} have {len(grouped)} weights quantised in groups, which is not supported; the first is {grouped[0]}, "
            "where [out, 1] is one scale for each output feature"
        )


def _in_config(hf_config: Any) -> dict[str, Any] | None:
    """The description inside a model's config, if there is one."""
    inside = getattr(hf_config, "quantization_config", None)
    return dict(inside) if isinstance(inside, Mapping) and describes_tensors(inside) else None


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a folder's safetensors files, from their headers.

    Raises:
        ValueError: a file that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    return shapes


def _layer_index(name: str) -> int:
    """Index of the decoder layer that a tensor is of; -1 for tensors outside."""
    _, found, after = name.partition(".layers.")
    first = after.partition(".")[0]
    return int(first) if found and first.isdecimal() else -1
