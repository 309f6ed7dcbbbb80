# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels, as this plugin calls them, take of a model and its cache. No vLLM here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_ascend.moe_layers import ConfigReader

__all__ = ["Attention", "broken", "head_sizes"]

_LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
_LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_SIZE_MULTIPLE = _BLOCK_MULTIPLE = 16
_LARGEST_SIZE = _LARGEST_BLOCK = 512
_MOST_HEADS, _MOST_QUERIES_A_KEY = 256, 64
# Keys of a config that ask for attention sinks, and architectures whose attention always has them.
_SINK_KEYS = (
    "add_swa_attention_sink_bias",
    "add_full_attention_sink_bias",
    "swa_attention_sink_enabled",
    "attention_sinks",
)
_SINK_ARCHITECTURES = ("GptOssForCausalLM", "OpenAIPrivacyFilterForTokenClassification")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """A model's attention and its cache; 0 is for sizes that are not known.

    Args:
        heads: query heads, of all ranks together.
        kv_heads: key and value heads, likewise.
        head_size: width of a query's and a key's head.
        value_size: width of a value's head.
        latent: `kv_lora_rank` and `qk_rope_head_dim` of a model whose attention runs as multi-head latent attention; None otherwise.
        missing: what the model's attention needs and the kernels do not have, each with the key or class of the model that asks for it.
        ranks: tensor parallel ranks.
        dtype: of keys and values, such as "bfloat16".
        cache_dtype: what the user gave as kv_cache_dtype.
        block_size: tokens of a block of the cache, where the user gave one.
    """

    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    value_size: int = 0
    latent: tuple[int, int] | None = None
    missing: tuple[str, ...] = ()
    ranks: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str = "auto"
    block_size: int = 0

    @classmethod
    def of(cls, vllm_config: Any) -> Attention:
        """From vLLM's `VllmConfig`, whose `model_config` is there."""
        model, cache = vllm_config.model_config, vllm_config.cache_config
        text = ConfigReader(model.hf_text_config)
        head_size = model.get_head_size()
        first, second = (text.get(name, default=0) for name in _LATENT_SIZES)
        latent = (first, second) if model.use_mla else None
        own_values = latent is None and not text.get("kv_lora_rank") and text.get("head_dim")
        return cls(
            heads=model.model_arch_config.total_num_attention_heads,
            kv_heads=model.get_total_num_kv_heads(),
            head_size=head_size,
            value_size=(text.get("v_head_dim") if own_values else None) or head_size,
            latent=latent,
            missing=tuple(_missing(model)),
            ranks=vllm_config.parallel_config.tensor_parallel_size,
            dtype=str(model.dtype).removeprefix("torch."),
            cache_dtype=cache.cache_dtype,
            block_size=cache.block_size if cache.user_specified_block_size else 0,
        )


def head_sizes(model: Any) -> list[int]:
    """The head sizes of a model's layers, ascending, of vLLM's `ModelConfig`."""
    overrides = getattr(model.model_arch_config, "per_layer_overrides", None) or ()
    return sorted({model.get_head_size(), *(layer["head_size"] for layer in overrides if "head_size" in layer)})


def _missing(model: Any) -> Iterator[str]:
    """What vLLM's `ModelConfig` says that the kernels do not have."""
    text, architectures = ConfigReader(model.hf_text_config), model.architectures
    if cap := text.get("attn_logit_softcapping"):
        yield f"a soft cap on attention logits (attn_logit_softcapping {cap})"
    if model.uses_alibi or "Step1ForCausalLM" in architectures:
        yield f"ALiBi position biases ({architectures[0]})"
    sinks = [key for key in _SINK_KEYS if text.get(key)]
    if sinks or any(name in _SINK_ARCHITECTURES for name in architectures):
        yield f"attention sinks ({sinks[0] if sinks else architectures[0]})"
    if topk := text.get("index_topk"):
        yield f"sparse attention (index_topk {topk})"
    if len(sizes := head_sizes(model)) > 1:
        yield f"layers with heads of several sizes ({', '.join(map(str, sizes))}): the cache has one shape for all of them"
    if model.is_mm_prefix_lm:
        yield f"bidirectional multimodal prefixes ({architectures[0]})"
    if model.is_encoder_decoder:
        yield f"cross-attention of encoder-decoder models ({architectures[0]})"


def broken(attention: Attention) -> Iterator[str]:
    """One finding for each limit that a model, its cache or the tensor parallel size exceeds.

    Source: torch_npu's documentation of `npu_fused_infer_attention_score` and `npu_scatter_pa_kv_cache`.
    """
    for feature in attention.missing:
        yield f"vllm-ascend has no attention kernel for {feature}; serve a model without it"
    if attention.heads:
        yield from _broken_latent(attention) if attention.latent is not None else _broken_heads(attention)
    if attention.cache_dtype not in ("auto", attention.dtype):
        yield (
            f"kv_cache_dtype ({attention.cache_dtype!r}) must be 'auto' or the model's dtype, {attention.dtype!r}: keys and values are kept as they are"
        )
    block = attention.block_size
    largest = _LARGEST_BLOCK if attention.latent is None else math.inf  # vLLM cuts those of latents into smaller ones
    if block % _BLOCK_MULTIPLE or block > largest:
        allowed = f"a multiple of {_BLOCK_MULTIPLE}" + (f", at most {largest}" if attention.latent is None else "")
        yield f"block_size ({block}) must be {allowed}; the default is 128"


def _broken_heads(attention: Attention) -> Iterator[str]:
    heads, kv_heads, ranks = attention.heads, attention.kv_heads, attention.ranks
    if heads % ranks:
        yield f"tensor_parallel_size ({ranks}) must divide the model's {heads} attention heads"
    if kv_heads and kv_heads % ranks and ranks % kv_heads:
        yield f"tensor_parallel_size ({ranks}) must divide the model's {kv_heads} key and value heads, or be a multiple of them"
    if kv_heads and heads % kv_heads:
        yield f"the model's {heads} attention heads must be a multiple of its {kv_heads} key and value heads"
    elif kv_heads and heads // kv_heads > _MOST_QUERIES_A_KEY:
        yield f"the model has {heads // kv_heads} attention heads for each key and value head; the kernel takes at most {_MOST_QUERIES_A_KEY}"
    if heads // ranks > _MOST_HEADS:
        yield f"the model has {heads // ranks} attention heads a rank; the kernel takes at most {_MOST_HEADS}; raise tensor_parallel_size"
    if attention.head_size != attention.value_size:
        yield f"the model's heads of keys ({attention.head_size} wide) and of values ({attention.value_size}) must be of one size"
    for size in sorted({attention.head_size, attention.value_size}):
        if size % _SIZE_MULTIPLE or size > _LARGEST_SIZE:
            yield f"the model's heads are {size} wide: the kernel takes multiples of {_SIZE_MULTIPLE} up to {_LARGEST_SIZE}"


def _broken_latent(attention: Attention) -> Iterator[str]:
    assert attention.latent is not None
    for (name, size), found in zip(_LATENT_SIZES.items(), attention.latent, strict=True):
        if found != size:
            yield f"{name} of this model is {found}: the NPU's kernel for multi-head latent attention takes {size} only"
    heads, left = divmod(attention.heads, attention.ranks)
    if left or heads not in _LATENT_HEADS:
        yield (
            f"multi-head latent attention with {attention.heads} heads over tensor_parallel_size {attention.ranks}: the NPU's kernel takes "
            f"{', '.join(map(str, _LATENT_HEADS))} heads a rank; change tensor_parallel_size if another one fits"
        )
