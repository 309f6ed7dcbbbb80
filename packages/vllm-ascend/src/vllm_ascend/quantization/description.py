# SPDX-License-Identifier: Apache-2.0
"""ModelSlim's description of a checkpoint: for each tensor, how it is quantised.

Format: "AscendV1" in ModelSlim's documentation. All tensors of a layer have the layer's type. No vLLM here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ascend.findings import refuse, shown

__all__ = ["DYNAMIC", "FLOAT", "STATIC", "Description", "describes_tensors", "needed_tensors"]

FLOAT, STATIC, DYNAMIC = "FLOAT", "W8A8", "W8A8_DYNAMIC"
_SUPPORTED = (
    f"vllm-ascend supports {DYNAMIC} and {STATIC} for linear layers, {DYNAMIC} for experts, {FLOAT} for everything"
)
# Keys that say of the whole model that more than weights and the inputs of products are quantised.
_BEYOND_PRODUCTS = re.compile(r"(?!model_quant_type$).*_quant_type|kv_cache_type")
# What a layer of a type has in the checkpoint, beside an optional bias.
_TENSORS = {
    FLOAT: ("weight",),
    STATIC: ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale"),
    DYNAMIC: ("weight", "weight_scale", "weight_offset"),
}
_WEIGHT_SCALE = ("weight_scale", "weight_offset")
# Norms around which ModelSlim can move outliers by a bias, if they are RMSNorms, which vLLM's have none.
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
# Layers that look rows up or give logits.
_VOCABULARY = ("embed_tokens", "word_embeddings", "wte", "lm_head", "output_layer")
_EXPERT = re.compile(r"\.experts\.\d+\.")
# QuaRot turns a model's weights once and for all, for which nothing is to be done here; the rotations of these names it leaves to every step.
_ROTATIONS_OF_STEPS = ("heads_rotation", "kronecker_rotation", "kronecker_rotation_m", "kronecker_rotation_n")


def describes_tensors(content: object) -> bool:
    """Whether `content` is a mapping with types of tensors in it, such as a description is."""
    described = content.items() if isinstance(content, Mapping) else ()
    return any(str(name).endswith(".weight") and isinstance(kind, str) for name, kind in described)


def needed_tensors(types: Mapping[str, str]) -> list[str]:
    """Names of the tensors without which a quantised layer cannot be computed, of all that are described."""
    return [name for name, kind in types.items() if kind != FLOAT and name.rpartition(".")[2] in _TENSORS[kind]]


@dataclass(frozen=True, slots=True)
class Description:
    """The types of a checkpoint's tensors.

    Args:
        types: `{tensor name: type}`.
        source: where they come from, for messages.
    """

    types: Mapping[str, str]
    source: str

    @classmethod
    def read(cls, content: Mapping[str, Any], source: str, *, rms_norms: bool) -> Description:
        """Check what a description says.

        Args:
            content: `{tensor name: type}`, and keys about the whole model, whose names have no dot.
            source: where it comes from, for messages.
            rms_norms: whether the model's norms are RMSNorms.

        Raises:
            ValueError: everything in it that is not supported.
        """
        types = {name: kind for name, kind in content.items() if "." in name and isinstance(kind, str)}
        found = [*_wrong_with_the_model(content), *_wrong_types(types), *_wrong_layers(types)]
        if rms_norms:
            found += _biases_of_norms(types)
        if not types:
            found.append("names no tensors: it must map each tensor of the checkpoint to its type")
        refuse(f"{source}: {finding}" for finding in found)
        return cls(types, source)

    def renamed(self, rename: Callable[[str], str | None]) -> Description:
        """The same for tensors of other names; those that `rename` answers with None are left out."""
        types = {new: kind for name, kind in self.types.items() if (new := rename(name)) is not None}
        return Description(types, self.source)

    def linear(self, layer: str, packed: Mapping[str, Sequence[str]]) -> str:
        """The type of the linear layer at path `layer`.

        Args:
            layer: dotted path in the model.
            packed: last component of a fused layer -> those of the layers that it is made of.

        Raises:
            ValueError: a part has no type, or the parts' types differ.
        """
        return self._common(layer, _parts(layer, packed))

    def has_weight_scale(self, layer: str, packed: Mapping[str, Sequence[str]]) -> bool:
        """Whether the linear layer at path `layer` has the scale and offset of its weight. Arguments as of `linear`.

        Raises:
            ValueError: some parts have them and some have not.
        """
        names = [f"{part}.{tensor}" for part in _parts(layer, packed) for tensor in _WEIGHT_SCALE]
        absent = [name for name in names if name not in self.types]
        if absent and len(absent) < len(names):
            raise ValueError(f"{self.source} lacks {absent[0]!r}, which other parts of layer {layer!r} have")
        return not absent

    def experts(self, layer: str, projections: Sequence[str], num_experts: int) -> str:
        """The type of all routed experts at path `layer`: `{layer}.{0..num_experts-1}.{projection}`.

        Raises:
            ValueError: as `linear`, or a static type, which grouped products have no kernel for.
        """
        parts = [f"{layer}.{expert}.{name}" for expert in range(num_experts) for name in projections]
        kind = self._common(layer, parts)
        if kind == STATIC:
            raise ValueError(f"{self.source}: experts {layer!r} are of type {kind!r}. {_SUPPORTED}")
        return kind

    def check_float(self, layer: str) -> None:
        """Raise ValueError if the layer at path `layer`, an embedding or LM head, is quantised."""
        kind = self.types.get(f"{layer}.weight", FLOAT)
        if kind != FLOAT:
            raise ValueError(
                f"{self.source}: {layer!r} is of type {kind!r}; embeddings and LM heads must be {FLOAT}. {_SUPPORTED}"
            )

    def _common(self, layer: str, parts: Iterable[str]) -> str:
        """The one type of all `parts`."""
        found: dict[str, str] = {}  # type -> the first part that has it
        for part in parts:
            kind = self.types.get(f"{part}.weight")
            if kind is None:
                raise ValueError(
                    f"{self.source} has no type for {part + '.weight'!r}, of the model's layer {layer!r}. {_SUPPORTED}"
                )
            found.setdefault(kind, part)
        if len(found) > 1:
            parts_of = ", ".join(f"{part!r} {kind}" for kind, part in found.items())
            raise ValueError(f"{self.source}: the parts of layer {layer!r} must have one type, but {parts_of}")
        return next(iter(found))


def _parts(layer: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    parent, _, name = layer.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(name, (name,))]


def _wrong_with_the_model(content: Mapping[str, Any]) -> Iterator[str]:
    """Findings for what keys say of the whole model."""
    for key, value in content.items():
        if "." not in key and _BEYOND_PRODUCTS.fullmatch(key) and value not in (None, "", FLOAT):
            yield f"{key}={shown(value)} is not supported. {_SUPPORTED}"
    size = content.get("group_size")
    if isinstance(size, int) and size > 0:
        yield f"group_size={shown(size)}: weights quantised in groups are not supported; quantise with a scale for each output feature (0)"
    metadata = content.get("metadata")
    quarot = metadata.get("quarot") if isinstance(metadata, Mapping) else None
    rotations = quarot if isinstance(quarot, Mapping) else {}
    for name in _ROTATIONS_OF_STEPS:
        rotation = rotations.get(name)
        if layers := rotation.get("layers") if isinstance(rotation, Mapping) else rotation:
            yield _rotation(f"metadata.quarot.{name} for layers {shown(layers)}")


def _rotation(what: str) -> str:
    return f"{what}: rotations that are applied in every step (online QuaRot) are not supported; quantise with `online: False`"


def _wrong_types(types: Mapping[str, str]) -> Iterator[str]:
    """Findings for types of tensors, one for each type."""
    others: dict[str, list[str]] = {}
    for name, kind in types.items():
        if name.rpartition(".")[2] in _ROTATIONS_OF_STEPS:
            others.setdefault("", []).append(name)
        elif kind not in _TENSORS:
            others.setdefault(kind, []).append(name)
    for kind, names in sorted(others.items()):
        first = _first(sorted(names), "tensors")
        yield f"{first} is of type {shown(kind)}. {_SUPPORTED}" if kind else _rotation(first)


def _wrong_layers(types: Mapping[str, str]) -> Iterator[str]:
    """Findings for layers whose type they cannot have, or that lack tensors of it."""
    layers = {name.removesuffix(".weight"): kind for name, kind in types.items() if name.endswith(".weight")}
    static = [layer for layer, kind in layers.items() if kind == STATIC]
    if experts := [layer for layer in static if _EXPERT.search(f"{layer}.")]:
        yield f"{_first(experts, 'experts')} is of type {STATIC!r}. {_SUPPORTED}"
    if latents := [layer for layer in static if layer.endswith(".kv_b_proj")]:
        yield f"{_first(latents, 'layers')} is of type {STATIC!r}; latent attention reads this weight back, so it must be {FLOAT} or {DYNAMIC}"
    for layer, kind in layers.items():
        if layer.rpartition(".")[2] in _VOCABULARY and kind in (STATIC, DYNAMIC):
            yield f"{layer!r} is of type {kind!r}; embeddings and LM heads must be {FLOAT}. {_SUPPORTED}"
    for kind in (STATIC, DYNAMIC):
        lacking = [
            name
            for layer, its_kind in layers.items()
            if its_kind == kind
            for tensor in _TENSORS[kind]
            if (name := f"{layer}.{tensor}") not in types
        ]
        if lacking:
            yield f"lacks {_first(lacking, 'tensors')}, which type {kind!r} of its layer needs"


def _biases_of_norms(types: Mapping[str, str]) -> Iterator[str]:
    """Findings for RMSNorms that have got a bias: vLLM's models have no place for it."""
    names = [
        name for name in types if name.endswith(".bias") and name.removesuffix(".bias").rpartition(".")[2] in _NORMS
    ]
    if names:
        yield f"{_first(names, 'tensors')} is the bias of an RMSNorm, which is not supported; quantise without an anti-outlier method that adds one"


def _first(names: Sequence[str], what: str) -> str:
    """The first of `names`, and how many more there are."""
    return repr(names[0]) + (f" (and {len(names) - 1} more {what})" if len(names) > 1 else "")
