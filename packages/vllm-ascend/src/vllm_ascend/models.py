# SPDX-License-Identifier: Apache-2.0
"""The linear layers of known models, read off their Hugging Face config. No vLLM: a test holds the list against real engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_ascend.findings import shown
from vllm_ascend.json_object import parse_object
from vllm_ascend.moe_layers import ConfigReader, moe_layers, unreadable_selectors
from vllm_ascend.quantization.files import description_files

__all__ = ["ARCHITECTURES", "Linear", "layers_of", "padded_vocabulary", "quantised_by", "read_config", "stage_layers"]

Config = Mapping[str, Any]


_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_MAY_BE_0 = ("experts", "_replace", "shared_expert_intermediate_size")
_SIZES = (
    *_REQUIRED, "intermediate_size", "num_key_value_heads", "head_dim", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
    "v_head_dim", "num_experts", "n_routed_experts", "num_local_experts", "n_shared_experts", "moe_intermediate_size",
    "shared_expert_intermediate_size", "decoder_sparse_step", "first_k_dense_replace",
)  # fmt: skip
_MOST_LAYERS, _LARGEST_SIZE = 10_000, 2**31 - 1  # far beyond every model; a table of that many layers can still be made


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer, whole.

    Args:
        path: its path in vLLM's model.
        kind: "column" (output features are cut), "row" (input features are) or "replicated".
        inputs: input features.
        outputs: output features, those of key and value heads apart.
        heads: of a qkv_proj: how many key and value heads, and the features of one of each together.
        bias: whether it has one.
        reduced_later: a row layer whose sum over ranks the model takes together with another's.
    """

    path: str
    kind: Literal["column", "row", "replicated"]
    inputs: int
    outputs: int
    heads: tuple[int, int] = (0, 0)
    bias: bool = False
    reduced_later: bool = False


def read_config(model: str) -> dict[str, Any]:
    """The config of a model's folder, or of a model on the Hugging Face hub; of a model of several parts that of its language model.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    file = Path(model) / "config.json"
    try:
        content = file.read_bytes() if file.exists() else None
        is_local = Path(model).exists()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if content is not None:
        config = parse_object(content, str(file))
    elif is_local:
        raise ValueError(f"{model}: there is no config.json in it")
    else:
        from transformers import PretrainedConfig

        try:
            config = PretrainedConfig.get_config_dict(model)[0]
        except OSError as error:
            raise ValueError(
                f"{model}: neither a folder nor a model on the hub ({str(error).splitlines()[0]})"
            ) from error
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    of_all = {key: config[key] for key in ("architectures", "quantization_config") if key in config}
    return {"architectures": [], **inner, **of_all}


def quantised_by(model: str, config: Config) -> str | None:
    """What says that the weights of `model`, a folder or a name, are quantised: a key of its config or a file beside it; None: nothing does."""
    if config.get("quantization_config"):
        return "quantization_config"
    return next(iter(description_files(model)), None)


def padded_vocabulary(tokens: int) -> int:
    """Rows of the embedding and the LM head: vLLM pads the vocabulary to a multiple of 64."""
    return -(-tokens // 64) * 64


def layers_of(config: Config) -> list[Linear]:
    """Every linear layer between the embedding and the LM head, in the order of the model.

    Raises:
        ValueError: an architecture that is not in `ARCHITECTURES`, or a config that lacks a size or has a wrong one.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError(f"the model's config has architectures {names!r}: it must be a list with one name or more")
    build = next((ARCHITECTURES[name] for name in names if isinstance(name, str) and name in ARCHITECTURES), None)
    if build is None:
        raise ValueError(f"architecture {names[0]!r} is not known here; known are {', '.join(sorted(ARCHITECTURES))}")
    _check_sizes(config, names[0])
    config = {key: value for key, value in config.items() if value is not None}
    reader = ConfigReader(config)
    for key in unreadable_selectors(reader):
        raise ValueError(
            f"the model's config has {key} {shown(config[key])}: vllm-ascend cannot read its MoE layers from that"
        )
    with_experts = frozenset(moe_layers(reader))
    try:
        return [
            layer
            for n in range(config["num_hidden_layers"])
            for layer in build(config, n in with_experts, f"model.layers.{n}")
        ]
    except KeyError as error:
        raise ValueError(
            f"the model's config lacks {error.args[0]}, which architecture {names[0]!r} must have"
        ) from None


def _check_sizes(config: Config, architecture: str) -> None:
    """ValueError unless every size is a whole number within reason."""
    for name in _SIZES:
        value, least = config.get(name), 0 if name.endswith(_MAY_BE_0) else 1
        if value is None and name in _REQUIRED:
            raise ValueError(f"the model's config lacks {name}, which architecture {architecture!r} must have")
        most = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most):
            raise ValueError(
                f"the model's config has {name} {shown(value)}: it must be a whole number, {least} to {most}"
            )


def stage_layers(layers: int, stages: int, stage: int) -> range:
    """The layers of a pipeline stage, as vLLM spreads them: what is left over goes to the last stages but one."""
    sizes = [layers // stages] * stages
    for late in range(2, layers % stages + 2):
        sizes[-late] += 1
    return range(sum(sizes[:stage]), sum(sizes[: stage + 1]))


def _attention(config: Config, path: str, *, qkv_bias: bool, o_bias: bool = False) -> Iterator[Linear]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    pairs = config.get("num_key_value_heads") or heads
    yield Linear(
        path=f"{path}.self_attn.qkv_proj", kind="column", inputs=hidden, outputs=heads * head, heads=(pairs, 2 * head), bias=qkv_bias
    )  # fmt: skip
    yield Linear(path=f"{path}.self_attn.o_proj", kind="row", inputs=heads * head, outputs=hidden, bias=o_bias)


def _latent_attention(config: Config, path: str) -> Iterator[Linear]:
    """DeepSeek's MLA."""
    hidden, heads, path = config["hidden_size"], config["num_attention_heads"], f"{path}.self_attn"
    rank, rope, value = config["kv_lora_rank"], config["qk_rope_head_dim"], config["v_head_dim"]
    nope = config["qk_nope_head_dim"]
    query_rank = config.get("q_lora_rank")
    if query_rank is None:
        yield Linear(path=f"{path}.kv_a_proj_with_mqa", kind="replicated", inputs=hidden, outputs=rank + rope)
        yield Linear(path=f"{path}.q_proj", kind="column", inputs=hidden, outputs=heads * (nope + rope))
    else:
        both = query_rank + rank + rope
        yield Linear(path=f"{path}.fused_qkv_a_proj", kind="replicated", inputs=hidden, outputs=both)
        yield Linear(path=f"{path}.q_b_proj", kind="column", inputs=query_rank, outputs=heads * (nope + rope))
    yield Linear(path=f"{path}.kv_b_proj", kind="column", inputs=rank, outputs=heads * (nope + value))
    yield Linear(path=f"{path}.o_proj", kind="row", inputs=heads * value, outputs=hidden)


def _mlp(config: Config, path: str, width: int, *, bias: bool = False, shared: bool = False) -> Iterator[Linear]:
    hidden = config["hidden_size"]
    yield Linear(path=f"{path}.gate_up_proj", kind="column", inputs=hidden, outputs=2 * width, bias=bias)
    yield Linear(path=f"{path}.down_proj", kind="row", inputs=width, outputs=hidden, bias=bias, reduced_later=shared)


def _gate(config: Config, path: str, experts: int) -> Linear:
    return Linear(path=f"{path}.gate", kind="replicated", inputs=config["hidden_size"], outputs=experts)


def _llama(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    bias = bool(config.get("attention_bias") or config.get("bias"))
    yield from _attention(config, path, qkv_bias=bool(config.get("qkv_bias", bias)), o_bias=bias)
    yield from _mlp(config, f"{path}.mlp", config["intermediate_size"], bias=bool(config.get("mlp_bias")))


def _qwen2(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    yield from _attention(config, path, qkv_bias=True)
    yield from _mlp(config, f"{path}.mlp", config["intermediate_size"])


def _qwen3(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    yield from _attention(config, path, qkv_bias=bool(config.get("attention_bias")))
    yield from _mlp(config, f"{path}.mlp", config["intermediate_size"])


def _qwen_moe(config: Config, has_experts: bool, path: str, *, qkv_bias: bool) -> Iterator[Linear]:
    yield from _attention(config, path, qkv_bias=qkv_bias)
    if not has_experts:
        yield from _mlp(config, f"{path}.mlp", config["intermediate_size"])
        return
    yield _gate(config, f"{path}.mlp", config["num_experts"])
    if width := config.get("shared_expert_intermediate_size"):
        yield Linear(path=f"{path}.mlp.shared_expert_gate", kind="replicated", inputs=config["hidden_size"], outputs=1)
        yield from _mlp(config, f"{path}.mlp.shared_expert", width, shared=True)


def _qwen2_moe(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    yield from _qwen_moe(config, has_experts, path, qkv_bias=bool(config.get("qkv_bias", True)))


def _qwen3_moe(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    yield from _qwen_moe(config, has_experts, path, qkv_bias=bool(config.get("attention_bias")))


def _deepseek_mlp(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    if not has_experts:
        yield from _mlp(config, f"{path}.mlp", config["intermediate_size"])
        return
    yield _gate(config, f"{path}.mlp", config["n_routed_experts"])
    if shared := config.get("n_shared_experts"):
        width = config["moe_intermediate_size"] * shared
        yield from _mlp(config, f"{path}.mlp.shared_experts", width, shared=True)


def _deepseek(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    yield from _latent_attention(config, path)
    yield from _deepseek_mlp(config, has_experts, path)


def _glm4_moe(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    yield from _attention(config, path, qkv_bias=bool(config.get("attention_bias")))
    yield from _deepseek_mlp(config, has_experts, path)


def _mixtral(config: Config, has_experts: bool, path: str) -> Iterator[Linear]:
    yield from _attention(config, path, qkv_bias=False)
    yield _gate(config, f"{path}.block_sparse_moe", config["num_local_experts"])


ARCHITECTURES: Mapping[str, Callable[[Config, bool, str], Iterator[Linear]]] = {
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
    "Glm4MoeForCausalLM": _glm4_moe,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
