# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels, as this plugin calls them, take of a model and its cache. No vLLM here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_ascend.attention.kernels import HEAD_SIZES, SINK_HEAD_SIZE, WIDE_HEAD_SIZE, cached_head_size, kernel_head_size
from vllm_ascend.moe_layers import ConfigReader

__all__ = [
    "BLOCK_SIZES",
    "HEAD_SIZES",
    "LATENT_BLOCK_SIZE",
    "LATENT_PIECES",
    "LATENT_QUERIES",
    "PLAIN_SIZE",
    "Attention",
    "broken",
    "cached_head_size",
    "check_cache",
    "composed",
    "has_plain_form",
    "kernel_head_size",
    "notices",
]

# Each number is that of a rule in ascend-sim's contracts of these kernels; tests/test_attention_limits.py compares them.
_LARGE_HEAD_SIZE = 256
BLOCK_SIZES = (128, 256, 384, 512)
"""Tokens of a block of the cache that the kernel takes of requests with several query tokens."""
LATENT_BLOCK_SIZE = 128
LATENT_QUERIES = 16
"""Query tokens of a request that the kernel takes in the absorbed form of latent attention."""
PLAIN_SIZE = 128
"""Width of keys without their rotary part, and of values, in the plain form of latent attention."""
# No hardware takes float32, but the simulator's relaxed mode does: attention/probe.py finds that out in the worker.
_DTYPES = ("bfloat16", "float32")
_LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
_LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_HEADS, _MOST_QUERIES_A_KEY, _MOST_NUMBERS_A_TOKEN, _MOST_NUMBERS = 256, 64, 65535, 2**31 - 1
_MOST_TOKENS, _MOST_REQUESTS = 65536, 65536
_MOST_NUMBERS_A_QUERY = 65534  # of all heads, where they are wide
_SECOND_MOST_TOKENS = 2**20  # of the second version of the operator
LATENT_PIECES = 4096
"""Requests of a step, or pieces of requests, that the kernel takes in the absorbed form."""
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
        missing: what the model's attention needs and this plugin does not have, each with the key or class of the model that asks for it.
        composed: what it needs and no kernel has, in the same words, and single operators compute.
        sinks: whether the kernel with attention sinks computes it.
        ranks: tensor parallel ranks.
        dtype: of keys and values, such as "bfloat16".
        cache_dtype: what the user gave as kv_cache_dtype.
        block_size: tokens of a block of the cache, where the user gave one.
        chunk: tokens of a chunk that layers with chunked local attention look back to; 0: there are none.
        plain_form: with `latent`, whether prompts take the plain form.
        tokens: query tokens of a step at most.
        requests: of a step, at most.
        cached: whether keys and values are kept; False for encoders.
        window: whether some layer sees a sliding window.
    """

    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    value_size: int = 0
    latent: tuple[int, int] | None = None
    missing: tuple[str, ...] = ()
    composed: tuple[str, ...] = ()
    sinks: bool = False
    ranks: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str = "auto"
    block_size: int = 0
    chunk: int = 0
    plain_form: bool = True
    tokens: int = 0
    requests: int = 0
    cached: bool = True
    window: bool = False

    @classmethod
    def of(cls, vllm_config: Any) -> Attention:
        """From vLLM's `VllmConfig`, whose `model_config` is there."""
        model, cache = vllm_config.model_config, vllm_config.cache_config
        text = ConfigReader(model.hf_text_config)
        head_size = model.get_head_size()
        first, second = (text.get(name, default=0) for name in _LATENT_SIZES)
        latent = (first, second) if model.use_mla else None
        scheduler = vllm_config.scheduler_config
        cached = model.attn_type != "encoder_only"
        slow = composed(model)
        own_values = latent is None and not text.get("kv_lora_rank") and text.get("head_dim")
        return cls(
            heads=model.model_arch_config.total_num_attention_heads,
            kv_heads=model.get_total_num_kv_heads(),
            head_size=head_size,
            value_size=(text.get("v_head_dim") if own_values else None) or head_size,
            latent=latent,
            missing=(*_missing(model), *(() if cached else slow)),
            composed=slow if cached else (),
            sinks=_asks_for_sinks(model) is not None,
            ranks=vllm_config.parallel_config.tensor_parallel_size,
            dtype=str(model.dtype).removeprefix("torch."),
            cache_dtype=cache.cache_dtype,
            block_size=cache.block_size if cache.user_specified_block_size else 0,
            chunk=text.get("attention_chunk_size", default=0),
            plain_form=latent is None
            or has_plain_form(text.get("qk_nope_head_dim", default=0), text.get("v_head_dim", default=0)),
            tokens=scheduler.max_num_batched_tokens,
            requests=scheduler.max_num_seqs,
            cached=cached,
        )

    @property
    def kernel_size(self) -> int:
        """Of the kernel's heads, to which the model's are padded; 0 where it takes none so large."""
        return SINK_HEAD_SIZE if self.sinks else cached_head_size(self.head_size)

    @property
    def is_wide(self) -> bool:
        """Whether the kernel takes heads so large in another layout than others."""
        return self.latent is None and self.kernel_size > HEAD_SIZES[-1]

    @property
    def width(self) -> int:
        """Numbers of a token's keys on each rank, as the cache has them."""
        return max(self.kv_heads // self.ranks, 1) * self.kernel_size


def composed(model: Any) -> tuple[str, ...]:
    """What vLLM's `ModelConfig` says that no kernel has, and that attention composed of single operators computes."""
    found, architecture = [], model.architectures[0]
    if cap := ConfigReader(model.hf_text_config).get("attn_logit_softcapping"):
        found.append(f"a soft cap on attention logits (attn_logit_softcapping {cap})")
    if model.uses_alibi:
        found.append(f"ALiBi position biases ({architecture})")
    if model.is_mm_prefix_lm:
        found.append(f"bidirectional multimodal prefixes ({architecture})")
    return tuple(found)


def _asks_for_sinks(model: Any) -> str | None:
    """The key or the class of a model that asks for attention sinks."""
    text = ConfigReader(model.hf_text_config)
    keys = (key for key in _SINK_KEYS if text.get(key))
    return next(keys, next((name for name in model.architectures if name in _SINK_ARCHITECTURES), None))


def _missing(model: Any) -> Iterator[str]:
    """What vLLM's `ModelConfig` says that this plugin does not have."""
    text, architecture = ConfigReader(model.hf_text_config), model.architectures[0]
    if architecture == "Step1ForCausalLM":
        yield f"ALiBi with roots of distances ({architecture})"
    if (asks := _asks_for_sinks(model)) is not None and (model.use_mla or model.attn_type == "encoder_only"):
        yield f"attention sinks of encoders and of multi-head latent attention ({asks})"
    if topk := text.get("index_topk"):
        yield f"sparse attention (index_topk {topk})"


def has_plain_form(qk_nope_head_dim: int, v_head_dim: int) -> bool:
    """Whether prompts of a model with latent attention take the plain form; with wider heads they take the absorbed one, in pieces."""
    return max(qk_nope_head_dim, v_head_dim) <= PLAIN_SIZE


def check_cache(blocks: int, block_size: int, width: int) -> None:
    """Refuse a cache of more numbers than the kernel counts.

    Args:
        blocks: of the cache.
        block_size: tokens of a block.
        width: numbers of a token, of its keys or its values.

    Raises:
        ValueError: the cache is too large.
    """
    if blocks * block_size * width > _MOST_NUMBERS:
        raise ValueError(
            f"{blocks} blocks of {block_size} tokens with {width} numbers each are more than the attention kernel's {_MOST_NUMBERS} numbers in the "
            f"keys of a layer; give --num-gpu-blocks-override {_MOST_NUMBERS // (block_size * width)} or less"
        )


def notices(attention: Attention) -> Iterator[str]:
    """What a user should know about a model that is within the limits."""
    for feature in attention.composed:
        yield (
            f"no attention kernel has {feature}: it is computed by single operators, which read the keys of all requests anew in every layer; expect a "
            "fraction of the usual speed"
        )
    if attention.latent is None and kernel_head_size(attention.head_size) == _LARGE_HEAD_SIZE:
        yield (
            f"the model's attention heads are {attention.head_size} wide: older versions of CANN refuse {_LARGE_HEAD_SIZE} numbers a head in this "
            "layout (error 561002)"
        )
    if attention.is_wide:
        yield (
            f"the model has attention heads {attention.head_size} wide: the kernel takes them in a layout in which each prompt of a step is a call of its own, "
            "and it has not been seen to run on hardware in this form"
        )


def broken(attention: Attention) -> Iterator[str]:
    """One finding for each limit that a model, its cache or the tensor parallel size exceeds.

    Source: torch_npu's documentation of `npu_fused_infer_attention_score`, its `_v2` and `npu_scatter_pa_kv_cache`.
    """
    for feature in attention.missing:
        yield f"vllm-ascend has no attention kernel for {feature}; serve a model without it"
    if attention.sinks and attention.composed:
        yield f"vllm-ascend has no attention kernel for attention sinks beside {attention.composed[0]}; serve a model without it"
    if attention.dtype not in _DTYPES:
        yield f"dtype ({attention.dtype!r}) is not one that the NPU's attention kernels take; give --dtype bfloat16"
    if attention.heads:
        yield from _broken_latent(attention) if attention.latent is not None else _broken_heads(attention)
    if attention.cache_dtype not in ("auto", attention.dtype):
        yield (
            f"kv_cache_dtype ({attention.cache_dtype!r}) must be 'auto' or the model's dtype, {attention.dtype!r}: keys and values are kept as they are"
        )
    block, default = attention.block_size, BLOCK_SIZES[0]
    if attention.latent is not None and block % default:  # vLLM cuts blocks of latents into those of the kernel
        yield f"block_size ({block}) must be a multiple of {default}, which is the default"
    if attention.latent is None and block and block not in BLOCK_SIZES:
        yield f"block_size ({block}) must be one of {', '.join(map(str, BLOCK_SIZES))}; {default} is the default"
    if attention.chunk % (block or default):
        yield f"attention_chunk_size of this model ({attention.chunk}) must be a multiple of block_size ({block or default})"
    second = attention.latent is not None or attention.sinks
    tokens, requests = (_SECOND_MOST_TOKENS, LATENT_PIECES) if second else (_MOST_TOKENS, _MOST_REQUESTS)
    if attention.tokens > tokens:
        yield f"max_num_batched_tokens ({attention.tokens}) must be at most {tokens}: the attention kernel's tokens of a step"
    if attention.requests > requests:
        yield f"max_num_seqs ({attention.requests}) must be at most {requests}: the attention kernel's requests of a step"


def _broken_heads(attention: Attention) -> Iterator[str]:
    heads, kv_heads, ranks = attention.heads, attention.kv_heads, attention.ranks
    if heads % ranks:
        yield f"tensor_parallel_size ({ranks}) must divide the model's {heads} attention heads"
    if kv_heads and kv_heads % ranks and ranks % kv_heads:
        yield f"tensor_parallel_size ({ranks}) must divide the model's {kv_heads} key and value heads, or be a multiple of them"
    if kv_heads and heads % kv_heads:
        yield f"the model's {heads} attention heads must be a multiple of its {kv_heads} key and value heads"
    elif kv_heads and heads // kv_heads > _MOST_QUERIES_A_KEY and heads // ranks > _MOST_QUERIES_A_KEY:
        yield f"the model has {heads // max(kv_heads, ranks)} attention heads for each key and value head; the kernel takes at most {_MOST_QUERIES_A_KEY}"
    if heads // ranks > _MOST_HEADS:
        yield f"the model has {heads // ranks} attention heads a rank; the kernel takes at most {_MOST_HEADS}; raise tensor_parallel_size"
    if attention.head_size != attention.value_size:
        yield f"the model's heads of keys ({attention.head_size} wide) and of values ({attention.value_size}) must be of one size"
    largest = SINK_HEAD_SIZE if attention.sinks else WIDE_HEAD_SIZE if attention.cached else HEAD_SIZES[-1]
    for size in sorted({attention.head_size, attention.value_size}):
        if size > largest:
            yield f"the model's heads are {size} wide: the kernel takes at most {largest}"
    if attention.is_wide and attention.window and attention.cached:
        yield (
            f"the model has layers with a sliding window and heads {attention.head_size} wide: the kernel has a window for heads of at most {HEAD_SIZES[-1]}; "
            "serve a model without such layers"
        )
    if attention.is_wide and (numbers := heads // ranks * attention.kernel_size) > _MOST_NUMBERS_A_QUERY:
        yield f"the queries of a token have {numbers} numbers on each rank; the kernel takes at most {_MOST_NUMBERS_A_QUERY} of heads so wide; raise tensor_parallel_size"
    if attention.width > _MOST_NUMBERS_A_TOKEN:
        yield f"the keys of a token have {attention.width} numbers on each rank; the kernel takes at most {_MOST_NUMBERS_A_TOKEN}; raise tensor_parallel_size"


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
    pieces = attention.tokens // LATENT_QUERIES + attention.requests
    if not attention.plain_form and pieces > LATENT_PIECES:
        yield (
            f"max_num_batched_tokens ({attention.tokens}) must be at most {(LATENT_PIECES - attention.requests) * LATENT_QUERIES} with max_num_seqs "
            f"({attention.requests}): prompts of this model take the kernel's absorbed form in pieces of {LATENT_QUERIES} tokens, {LATENT_PIECES} a step"
        )
