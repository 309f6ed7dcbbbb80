# SPDX-License-Identifier: Apache-2.0
"""ModelSlim's `quant_model_description.json`: for each tensor of a checkpoint, how it is quantised.

Format: "AscendV1" in ModelSlim's documentation. All tensors of a layer have the layer's type. No vLLM here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["DYNAMIC", "FILE", "FLOAT", "STATIC", "Description"]

FILE = "quant_model_description.json"
FLOAT, STATIC, DYNAMIC = "FLOAT", "W8A8", "W8A8_DYNAMIC"
_SUPPORTED = (
    f"vllm-ascend supports {DYNAMIC} and {STATIC} for linear layers, {DYNAMIC} for experts, {FLOAT} for everything"
)
# Keys that say of the whole model that more than weights and the inputs of products are quantised.
_BEYOND_PRODUCTS = ("kv_quant_type", "kv_cache_type", "fa_quant_type", "reduce_quant_type")
# What a layer of a type has in the checkpoint, beside an optional bias.
_TENSORS = {
    FLOAT: ("weight",),
    STATIC: ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale"),
    DYNAMIC: ("weight", "weight_scale", "weight_offset"),
}
# Norms around which ModelSlim can move outliers by a bias, if they are RMSNorms, which vLLM's have none.
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


class Description:
    """The types of a checkpoint's tensors.

    Args:
        content: the file's: `{tensor name: type}`, and keys about the whole model, whose names have no dot.

    Raises:
        ValueError: something is quantised in a way that is not supported.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Check every type."""
        for key in _BEYOND_PRODUCTS:
            if content.get(key) not in (None, "", FLOAT):
                raise ValueError(f"{FILE}: {key}={content[key]!r} is not supported. {_SUPPORTED}")
        self.types = {name: kind for name, kind in content.items() if "." in name and isinstance(kind, str)}
        others = sorted((name, kind) for name, kind in self.types.items() if kind not in _TENSORS)
        if others:
            more = f" (and {len(others) - 1} more tensors)" if len(others) > 1 else ""
            raise ValueError(f"{FILE}: {others[0][0]!r} is of type {others[0][1]!r}{more}. {_SUPPORTED}")
        if not self.types:
            raise ValueError(f"{FILE} names no tensors: it must map each tensor of the checkpoint to its type")

    def renamed(self, rename: Callable[[str], str | None]) -> Description:
        """The same for tensors of other names; those that `rename` answers with None are left out."""
        return Description({new: kind for name, kind in self.types.items() if (new := rename(name)) is not None})

    def check_rms_norms(self) -> None:
        """Raise ValueError where an RMSNorm has got a bias: vLLM's models have no place for it."""
        for name in self.types:
            layer, _, tensor = name.rpartition(".")
            if tensor == "bias" and layer.rpartition(".")[2] in _NORMS:
                raise ValueError(
                    f"{FILE}: {name!r} is the bias of an RMSNorm, which is not supported; quantise without an anti-outlier method that adds one"
                )

    def linear(self, layer: str, packed: Mapping[str, Sequence[str]]) -> str:
        """The type of the linear layer at path `layer`.

        Args:
            layer: dotted path in the model.
            packed: last component of a fused layer -> those of the layers that it is made of.

        Raises:
            ValueError: a part has no type or lacks a tensor, or the parts' types differ.
        """
        parent, _, name = layer.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in packed.get(name, (name,))]
        return self._common(layer, parts)

    def experts(self, layer: str, projections: Sequence[str], num_experts: int) -> str:
        """The type of all routed experts at path `layer`: `{layer}.{0..num_experts-1}.{projection}`.

        Raises:
            ValueError: as `linear`, or a static type, which grouped products have no kernel for.
        """
        parts = [f"{layer}.{expert}.{name}" for expert in range(num_experts) for name in projections]
        kind = self._common(layer, parts)
        if kind == STATIC:
            raise ValueError(f"{FILE}: experts {layer!r} are of type {kind!r}. {_SUPPORTED}")
        return kind

    def check_float(self, layer: str) -> None:
        """Raise ValueError if the layer at path `layer`, an embedding or LM head, is quantised."""
        kind = self.types.get(f"{layer}.weight", FLOAT)
        if kind != FLOAT:
            raise ValueError(
                f"{FILE}: {layer!r} is of type {kind!r}; embeddings and LM heads must be {FLOAT}. {_SUPPORTED}"
            )

    def _common(self, layer: str, parts: Iterable[str]) -> str:
        """The one type of all `parts`, which have all their tensors."""
        found: dict[str, str] = {}  # type -> the first part that has it
        for part in parts:
            kind = self.types.get(f"{part}.weight")
            if kind is None:
                raise ValueError(
                    f"{FILE} has no type for {part + '.weight'!r}, of the model's layer {layer!r}. {_SUPPORTED}"
                )
            found.setdefault(kind, part)
            for tensor in _TENSORS[kind]:
                if f"{part}.{tensor}" not in self.types:
                    raise ValueError(
                        f"{FILE} lacks {part + '.' + tensor!r}, which type {kind!r} of layer {layer!r} needs"
                    )
        if len(found) > 1:
            parts_of = ", ".join(f"{part!r} {kind}" for kind, part in found.items())
            raise ValueError(f"{FILE}: the parts of layer {layer!r} must have one type, but {parts_of}")
        return next(iter(found))
