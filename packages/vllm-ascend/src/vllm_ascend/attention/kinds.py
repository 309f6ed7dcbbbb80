# SPDX-License-Identifier: Apache-2.0
"""Models whose layers differ in their heads (Gemma 4), and what the limits say of each kind of layer of any model. No vLLM here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vllm_ascend.attention import limits
from vllm_ascend.attention.limits import Attention

__all__ = ["broken", "choose_backend", "differ", "notices", "of_layers"]


def differ(model: Any) -> bool:
    """Whether layers of vLLM's `ModelConfig` differ in the width of their heads, or in how many keys and values have."""
    return len(_heads(model)) > 1


def choose_backend(vllm_config: Any) -> None:
    """Take back the backend that vLLM has written into the configuration of a model whose layers differ: it knows those of CUDA alone, and writes Triton's."""
    model, attention = vllm_config.model_config, vllm_config.attention_config
    written = attention.backend is not None and attention.backend.name == "TRITON_ATTN"
    if written and model is not None and differ(model):
        attention.backend = None


def _heads(model: Any) -> dict[tuple[int, int], bool]:
    """(width, heads of keys and values) of each kind of layer, ascending, and whether some layer of the kind has a sliding window."""
    text, known = model.hf_text_config, model.model_arch_config
    types, overrides = getattr(text, "layer_types", None), getattr(known, "per_layer_overrides", None)
    if not overrides:
        return {(model.get_head_size(), model.get_total_num_kv_heads()): model.get_sliding_window() is not None}
    found: dict[tuple[int, int], bool] = {}
    for index in range(len(overrides)):
        kind = known[index].head_size, known[index].total_num_kv_heads
        found[kind] = found.get(kind, False) or bool(types and types[index] == "sliding_attention")
    return dict(sorted(found.items()))


def of_layers(vllm_config: Any) -> list[Attention]:
    """The attention of each kind of layer, of vLLM's `VllmConfig` whose `model_config` is there. Of a model with latent attention all layers are alike."""
    whole, model = Attention.of(vllm_config), vllm_config.model_config
    if whole.latent is not None:
        return [whole]
    kinds = _heads(model)
    if len(kinds) == 1:
        return [replace(whole, window=next(iter(kinds.values())))]
    return [
        replace(whole, head_size=size, value_size=size, kv_heads=kv_heads, window=window)
        for (size, kv_heads), window in kinds.items()
    ]


def broken(vllm_config: Any) -> list[str]:
    """One finding for each limit that some layer's attention, or that of all together, exceeds."""
    kinds = of_layers(vllm_config)
    found = [finding for attention in kinds for finding in limits.broken(attention)]
    if len(kinds) > 1:
        found += _of_several(kinds)
    return list(dict.fromkeys(found))


def _of_several(kinds: list[Attention]) -> Iterator[str]:
    sizes = ", ".join(f"{kind.kv_heads} of {kind.head_size}" for kind in kinds)
    several = f"layers whose heads of keys and values differ ({sizes})"
    first = kinds[0]
    if first.sinks:
        yield f"vllm-ascend has no attention kernel for {several} beside attention sinks; serve a model without one of them"
    # vLLM gives all layers blocks of as many bytes: more tokens where a token takes fewer.
    widths = [kind.width for kind in kinds]
    if any(max(widths) % width for width in widths if width):
        yield (
            f"the model has {several}, and a token's keys have {', '.join(map(str, widths))} numbers on each of {first.ranks} ranks: the smaller numbers must divide the "
            "largest one; change tensor_parallel_size if another one fits"
        )


def notices(vllm_config: Any) -> list[str]:
    """What a user should know about a model that is within the limits."""
    return list(dict.fromkeys(said for attention in of_layers(vllm_config) for said in limits.notices(attention)))
