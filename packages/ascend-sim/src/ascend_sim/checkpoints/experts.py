# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts made of a dense Llama: a Mixtral that writes the same text."""

from pathlib import Path
from typing import Any

from ascend_sim.checkpoints.folder import (
    RECIPE_FORMAT,
    Progress,
    already_there,
    check_room,
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

__all__ = ["upcycle"]

MOST_EXPERTS = 1024  # more than any published model has, and as many as npu_moe_distribute_dispatch_v2 takes
_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def upcycle(
    source: Path, directory: Path, *, experts: int, top_k: int, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Make a mixture of experts of the dense Llama checkpoint ``source``: a Mixtral that writes the same text.

    Each expert is the dense MLP with its intermediate neurons in another order, which changes the weights and not the
    function; Mixtral's routing weights sum to one. So the output equals that of ``source``, up to the order of the
    sums, whatever the random router decides, and a mixed-up expert weight shows at once. The same arguments give the
    same bytes. One shard per layer is written, so that memory holds one layer.

    Args:
        source: a Llama checkpoint (config.json, safetensors) without biases and with SiLU. Its dtype is kept.
        directory: where the new checkpoint shall be; absent, empty, or made by an earlier call.
        experts: number of experts in each layer, at most 1024.
        top_k: experts that each token visits, in 1..``experts``.
        seed: of the neurons' orders and the router's weights.
        progress: told of the stage "upcycle", in shards.

    Returns:
        ``directory``.

    Raises:
        ValueError: ``experts``, ``top_k`` or ``seed`` is out of range, or ``source`` is no such Llama checkpoint, or a damaged one.
        OSError: the file system has less room than the new checkpoint needs.
        FileNotFoundError: ``source`` has no config.json or no safetensors.
        FileExistsError: ``directory`` holds something else.
        RuntimeError: a Python package is missing.
    """
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(f"experts={experts}: must be in 1..{MOST_EXPERTS}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k}: must be in 1..experts, that is 1..{experts}")
    if seed < 0:
        raise ValueError(f"seed={seed}: must not be negative")
    report = progress or silent
    config = _mixtral_config(source, experts, top_k)
    weight_files = find_tensors(source)
    _check_tensors(source, weight_files, config)
    recipe = {
        "format": RECIPE_FORMAT,
        "model": "upcycle",
        "source_sha256": source_sha256(source, weight_files),
        "experts": experts,
        "top_k": top_k,
        "seed": seed,
    }
    if already_there(directory, recipe):
        return directory
    check_room(directory, _least_bytes(config))
    with new_directory(directory, recipe) as draft:
        copy_beside_weights(source, draft)
        write_json(draft / "config.json", config)
        _write_mixtral_shards(source, weight_files, config, draft, seed, report)
    return directory


def _mixtral_config(source: Path, experts: int, top_k: int) -> dict[str, Any]:
    """Build the Mixtral ``config.json`` for the Llama in ``source``, its unwritten defaults filled in.

    Raises:
        ValueError: ``source`` is no Llama, or has what Mixtral lacks.
        FileNotFoundError: ``source`` has no config.json.
    """
    file, llama = source / "config.json", read_config(source)
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    for key, needed in {"model_type": "llama", **required}.items():
        value = llama.get(key, required.get(key))
        if value != needed:
            raise ValueError(f"{file} has {key} = {value!r}: only {needed!r} can be upcycled to a Mixtral")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if type(llama.get(key)) is not int or llama[key] < 1:
            raise ValueError(f"{file} has {key} = {llama.get(key)!r}: must be a whole number of at least 1")
    heads = llama["num_attention_heads"]
    rope = llama.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": llama.get("rope_theta", 10000.0),
        **(llama.get("rope_scaling") or {}),
    }
    kept = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["hidden_size"],
        "intermediate_size": llama["intermediate_size"],
        "num_hidden_layers": llama["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("num_key_value_heads") or heads,
        "head_dim": llama.get("head_dim") or llama["hidden_size"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": llama.get("max_position_embeddings", 2048),
        "rms_norm_eps": llama.get("rms_norm_eps", 1e-6),
        "rope_parameters": rope,
        "sliding_window": None,
        "tie_word_embeddings": llama.get("tie_word_embeddings", False),
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        **{key: llama[key] for key in kept if key in llama},
    }


def _check_tensors(source: Path, weight_files: dict[str, str], config: dict[str, Any]) -> None:
    """Raise ValueError unless the checkpoint has the MLPs of all layers of its config, and no further layers."""
    layers = range(config["num_hidden_layers"])
    wanted = {f"model.layers.{layer}.mlp.{name}.weight" for layer in layers for name in _EXPERT_NAMES}
    if absent := sorted(wanted - weight_files.keys()):
        raise ValueError(
            f"source={source} lacks {len(absent)} tensors that a Llama of {len(layers)} layers has, such as {absent[0]}"
        )
    beyond = sorted(
        name for name in weight_files if name.startswith("model.layers.") and name.split(".")[2] not in map(str, layers)
    )
    if beyond:
        raise ValueError(
            f"source={source} has tensors of layers that its config does not have ({len(layers)} layers), such as {beyond[0]}"
        )


def _least_bytes(config: dict[str, Any]) -> int:
    """Bytes of the new checkpoint's experts, of at least two bytes a number."""
    neurons: int = config["num_hidden_layers"] * config["num_local_experts"] * config["intermediate_size"]
    return 3 * neurons * int(config["hidden_size"]) * 2


def _write_mixtral_shards(
    source: Path, weight_files: dict[str, str], config: dict[str, Any], folder: Path, seed: int, report: Progress
) -> None:
    """Write the Mixtral's tensors as shards with an index: one of what is outside of the layers, one per layer."""
    save_file = module("safetensors.torch").save_file
    layers = config["num_hidden_layers"]
    shards: list[list[str]] = [[] for _ in range(layers + 1)]
    for name in weight_files:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        shards[layer + 1].append(name)
    weight_map, total_size = {}, 0
    for number, names in enumerate(shards):
        report("upcycle", number, len(shards))
        tensors = read_tensors(source, weight_files, names)
        if number > 0:
            tensors = _mixtral_layer(tensors, number - 1, config["num_local_experts"], seed)
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )
    report("upcycle", len(shards), len(shards))


def _mixtral_layer(llama: dict[str, Any], layer: int, experts: int, seed: int) -> dict[str, Any]:
    """Turn the tensors of one Llama layer into those of a Mixtral layer.

    Args:
        llama: the layer's tensors by full name; gate_proj, up_proj [intermediate, hidden], down_proj transposed.
        layer: index of the layer, which with ``seed`` decides the neurons' orders and the router.
        experts: number of experts.
        seed: see `upcycle`.

    Returns:
        The new layer's tensors by full name: w1, w3 [intermediate, hidden] and w2 [hidden, intermediate] of each
        expert, gate [experts, hidden], and all but the MLP unchanged.
    """
    torch, numpy = module("torch"), module("numpy")
    random = numpy.random.default_rng([seed, layer])
    prefix = f"model.layers.{layer}"
    mlp = {new: llama.pop(f"{prefix}.mlp.{old}.weight") for old, new in _EXPERT_NAMES.items()}
    intermediate, hidden = mlp["w1"].shape
    # Scores of about unit variance, from activations that RMSNorm has scaled to about one.
    router = torch.from_numpy(random.standard_normal((experts, hidden)) / hidden**0.5)
    mixtral = {**llama, f"{prefix}.block_sparse_moe.gate.weight": router.to(mlp["w1"].dtype)}
    for expert in range(experts):
        order = torch.from_numpy(random.permutation(intermediate))
        for name, weight in mlp.items():
            axis = 1 if name == "w2" else 0
            mixtral[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = weight.index_select(axis, order)
    return mixtral
