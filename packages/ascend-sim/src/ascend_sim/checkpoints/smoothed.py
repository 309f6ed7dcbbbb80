# SPDX-License-Identifier: Apache-2.0
"""A Llama that computes the same and is easier to quantise: outliers of activations moved into weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascend_sim.checkpoints.folder import (
    RECIPE_FORMAT,
    Progress,
    already_there,
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

__all__ = ["smooth"]

# What takes the factors out of an activation, and the layers that get them; of a layer's path, in this order.
_PAIRS = (
    ("mlp.up_proj", ("mlp.down_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
)


def smooth(source: Path, directory: Path, *, texts: Sequence[Sequence[int]], progress: Progress | None = None) -> Path:
    """Make a checkpoint that computes the same as the dense Llama ``source`` and loses less when it is quantised.

    Each input channel of the quantised products is divided by a factor f, and the weights that it meets are multiplied
    by it: ``f = sqrt(max|activation| / max|weight|)`` of the channel, as in SmoothQuant (Xiao et al., 2023, alpha = 0.5).
    What comes before takes it up: an RMSNorm's weight, or up_proj's output channel. f is rounded to a power of two,
    so that every product and sum stays the same to the bit.

    Args:
        source: a Llama checkpoint (config.json, safetensors) without biases. Its dtype is kept.
        directory: where the new checkpoint shall be; absent, empty, or made by an earlier call.
        texts: token ids of each text of which the activations' sizes are taken. They should begin as texts do in use: the
            first token's activations are often much larger than all others.
        progress: told of the stages "calibrate" and "save".

    Returns:
        ``directory``.

    Raises:
        ValueError: no texts, an empty one, or ``source`` is no such Llama checkpoint.
        FileNotFoundError: ``source`` has no config.json or no safetensors.
        FileExistsError: ``directory`` holds something else.
        RuntimeError: a Python package is missing.
    """
    if not texts or not all(texts):
        raise ValueError(f"texts={texts!r}: must be texts of at least one token each")
    report = progress or silent
    config = read_config(source)
    for key, needed in (("model_type", "llama"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, False) != needed:
            raise ValueError(
                f"{source / 'config.json'} has {key} = {config.get(key)!r}: only {needed!r} can be smoothed"
            )
    weight_files = find_tensors(source)
    recipe = {
        "format": RECIPE_FORMAT,
        "model": "smooth",
        "source_sha256": source_sha256(source, weight_files),
        "texts": [list(text) for text in texts],
    }
    if already_there(directory, recipe):
        return directory
    with new_directory(directory, recipe) as draft:
        copy_beside_weights(source, draft)
        write_json(draft / "config.json", config)
        report("calibrate", 0, 1)
        largest = _largest_inputs(source, texts)
        report("calibrate", 1, 1)
        report("save", 0, 1)
        tensors = read_tensors(source, weight_files, sorted(weight_files))
        for layer in range(config["num_hidden_layers"]):
            _smooth_layer(tensors, largest, f"model.layers.{layer}")
        module("safetensors.torch").save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        report("save", 1, 1)
    return directory


def _largest_inputs(source: Path, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """For each linear layer's path the largest magnitude [in] of each channel of its input, in float32."""
    torch = module("torch")
    model = module("transformers").AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    largest: dict[str, Any] = {}

    def note(path: str, inputs: tuple[Any, ...]) -> None:
        found = inputs[0].abs().flatten(0, -2).amax(0)
        largest[path] = torch.maximum(found, largest[path]) if path in largest else found

    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, inputs, path=path: note(path, inputs))
    with torch.inference_mode():
        for text in texts:
            model(torch.tensor([list(text)]))
    return largest


def _smooth_layer(tensors: dict[str, Any], largest: dict[str, Any], layer: str) -> None:
    """Replace the weights of the layer at path ``layer``."""
    torch = module("torch")
    for before, after in _PAIRS:
        names = [f"{layer}.{name}.weight" for name in after]
        weight = torch.stack([tensors[name].float().abs().amax(0) for name in names]).amax(0)
        activation = largest[f"{layer}.{after[0]}"]
        alive = (weight > 0) & (activation > 0)
        ratio = torch.where(alive, activation / weight, 1.0)
        factor = torch.exp2((ratio.log2() / 2).round())
        for name in names:
            tensors[name] = tensors[name] * factor.to(tensors[name].dtype)
        taken = f"{layer}.{before}.weight"
        divisor = factor if tensors[taken].dim() == 1 else factor[:, None]
        tensors[taken] = tensors[taken] / divisor.to(tensors[taken].dtype)
