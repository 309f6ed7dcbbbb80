# SPDX-License-Identifier: Apache-2.0
"""Which decoder layers of a model have routed experts, read off its Hugging Face config. No vLLM: a test holds it against vLLM's model classes.

Each family has keys of its own for this; those below are all that the models of vLLM 0.32 and the configs of transformers use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["ConfigReader", "moe_layers", "routed_experts", "unknown_selectors", "unreadable_selectors"]

_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
# Keys that say which layers have experts, all of which `_has_experts` reads, by the form of their values.
_NUMBERS = frozenset({
    "decoder_sparse_step", "expert_layer_offset", "expert_layer_period", "first_k_dense_replace", "interleave_moe_layer_step", "moe_every_n_layers",
    "moe_layer_end_index", "moe_layer_interval", "moe_layer_start_index", "moe_start_layer", "num_dense_layers",
})  # fmt: skip
_LISTS = frozenset({
    "hybrid_override_pattern", "layers_block_type", "mlp_layer_types", "mlp_only_layers", "moe_layer_freq", "moe_layers", "moe_layers_enum",
})  # fmt: skip
_SELECTORS = _NUMBERS | _LISTS
# Families that begin with one dense layer where the config does not say how many: by model_type or architecture, in lower case.
_BEGIN_WITH_A_DENSE_LAYER = ("param2moe", "sarvam", "step3")
_OTHER = frozenset({"prefix_dense_sliding_window_pattern"})  # about attention, of Cohere 2 MoE
# Names that a key for this would have: experts or density, and something that counts layers.
_ABOUT_EXPERTS = re.compile(r"moe|expert|sparse|dense")
_ABOUT_LAYERS = re.compile(r"(^|_)(layers?|steps?|freq|frequency|period|offset|interval|every|start|end|pattern)(_|$)")


class ConfigReader:
    """The keys of a config, whichever form it has.

    Args:
        config: a Hugging Face config of a language model, or a mapping of its keys.
    """

    def __init__(self, config: object) -> None:
        """Store the config."""
        self._config = config

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of `names` that the config has and that is not None; else `default`."""
        for name in names:
            value = self._value(name)
            if value is not None:
                return value
        return default

    def _value(self, name: str) -> Any:
        """A key's value, a list with that of each layer where transformers knows that layers may differ (Gemma 4), or None."""
        if isinstance(self._config, Mapping):
            return self._config.get(name)
        if name in (getattr(self._config, "per_layer_attributes", None) or ()):
            return [getattr(layer, name, None) for layer in self._config.per_layer_config]  # type: ignore[attr-defined]
        return getattr(self._config, name, None)

    def number(self, *names: str) -> int:
        """The value of the first of `names` that is there; 0 where none is, or where it is not one number for all layers."""
        value = self.get(*names, default=0)
        return value if isinstance(value, int) else 0

    @property
    def names(self) -> list[str]:
        """The names of all keys."""
        return list(self._config if isinstance(self._config, Mapping) else vars(self._config))


def routed_experts(config: ConfigReader) -> int:
    """Routed experts of a MoE layer, the most where layers differ; 0 for a dense model."""
    experts = config.get(*_EXPERTS, default=0)
    if isinstance(experts, (list, tuple)):
        return max((one for one in experts if isinstance(one, int)), default=0)
    return experts if isinstance(experts, int) else 0


def moe_layers(config: ConfigReader) -> tuple[int, ...]:
    """Indices of the decoder layers that have routed experts, ascending; empty for a dense model, and where `unreadable_selectors` has any."""
    if not routed_experts(config) or unreadable_selectors(config):
        return ()
    return tuple(layer for layer in range(config.number("num_hidden_layers")) if _has_experts(layer, config))


def unknown_selectors(config: ConfigReader) -> tuple[str, ...]:
    """Keys of a MoE model's config that seem to choose layers with experts, and that `moe_layers` does not know or cannot read."""
    if not routed_experts(config):
        return ()
    unknown = [
        key
        for key in config.names
        if key not in _SELECTORS | _OTHER
        and _ABOUT_EXPERTS.search(key)
        and _ABOUT_LAYERS.search(key)
        and not isinstance(config.get(key), (bool, float, type(None)))
        and config.get(key) not in (0, "", [], ())
    ]
    return tuple(sorted([*unknown, *unreadable_selectors(config)]))


def unreadable_selectors(config: ConfigReader) -> tuple[str, ...]:
    """Keys of a MoE model's config that choose layers with experts, and have a value of a form that `moe_layers` does not know."""
    if not routed_experts(config):
        return ()
    told = {key: config.get(key) for key in sorted(_SELECTORS)}
    return tuple(key for key, value in told.items() if value is not None and not _is_readable(key, value))


def _is_readable(key: str, value: object) -> bool:
    if key in _NUMBERS or (key == "moe_layer_freq" and not isinstance(value, (list, tuple))):
        return _is_index(value)
    if key in ("moe_layers", "moe_layers_enum") and isinstance(value, str):
        return all(one.strip().isdecimal() for one in value.split(","))
    if key == "hybrid_override_pattern":
        return isinstance(value, str)
    if not isinstance(value, (list, tuple)):
        return False
    if key == "moe_layer_freq":
        return all(isinstance(one, int) for one in value)  # flags
    kind = str if key in ("layers_block_type", "mlp_layer_types") else int
    return all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _has_experts(layer: int, config: ConfigReader) -> bool:
    """Whether a decoder layer of a MoE model has experts. Keys that name every layer come before those that count."""
    named = _named(layer, config)
    if named is not None:
        return named
    if layer in config.get("mlp_only_layers", default=()):  # Qwen
        return False
    if (layer + 1) % _every(
        config, "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"
    ):  # Qwen, Llama 4, Ernie
        return False
    if config.number("moe_every_n_layers") and layer % config.number("moe_every_n_layers") != 1:  # Nomic's encoder
        return False
    if layer % _every(config, "expert_layer_period") != config.number("expert_layer_offset"):  # Jamba
        return False
    first = config.get(
        "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "moe_start_layer",
        default=int(_is_of(config, *_BEGIN_WITH_A_DENSE_LAYER)),
    )  # fmt: skip
    counted_from = first if _is_of(config, "sarvam") else 0
    if (layer - counted_from) % _every(config, "moe_layer_freq"):  # DeepSeek, GLM
        return False
    return bool(first <= layer <= config.get("moe_layer_end_index", default=layer))


def _is_of(config: ConfigReader, *families: str) -> bool:
    """Whether the config's model_type or its first architecture begins with one of `families`."""
    names = [config.get("model_type", default=""), *list(config.get("architectures", default=()))[:1]]
    return any(isinstance(name, str) and name.lower().startswith(families) for name in names)


def _every(config: ConfigReader, *names: str) -> int:
    return max(config.number(*names), 1)


def _named(layer: int, config: ConfigReader) -> bool | None:
    """What a key says that has an entry for each layer, or lists the layers; None where the config has no such key."""
    types = config.get("mlp_layer_types")  # "dense" or "sparse"
    if isinstance(types, (list, tuple)):
        return layer < len(types) and types[layer] != "dense"
    pattern = config.get("hybrid_override_pattern")  # Nemotron-H: one letter a layer
    if isinstance(pattern, str):
        return pattern[layer : layer + 1] == "E"
    blocks = config.get("layers_block_type")  # the same in words; other families have only kinds of attention in it
    if isinstance(blocks, (list, tuple)) and "moe" in blocks:
        return layer < len(blocks) and blocks[layer] == "moe"
    flags = config.get("moe_layer_freq")  # one flag a layer, of MiMo and MiniMax
    if isinstance(flags, (list, tuple)):
        return layer < len(flags) and bool(flags[layer])
    listed = config.get("moe_layers_enum")  # Step3, "4,5,6"
    if listed is None and not config.number("interleave_moe_layer_step"):  # by which vLLM's Llama 4 goes
        listed = config.get("moe_layers")
    if isinstance(listed, (str, list, tuple)):
        numbers = listed.strip().split(",") if isinstance(listed, str) else listed
        return layer in [int(one) for one in numbers]
    return None
