# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of a model, made by Hugging Face's peft, and the tokens that it says with each of them."""

from dataclasses import dataclass, field

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Adapters in folders.

    Attributes:
        folders: of each adapter, by its name.
        tokens: for each adapter's name, and for "base", the greedy tokens of each prompt.
        merged: the tokens of a model into whose weights each adapter was merged.
    """

    folders: dict = field(default_factory=dict)
    tokens: dict = field(default_factory=dict)
    merged: dict = field(default_factory=dict)


def make(folder, base, prompts, length, generate, adapters):
    """Make adapters with random weights.

    Args:
        folder: where to.
        base: the model's folder.
        prompts: token ids.
        length: tokens that are generated.
        generate: as `hugging_face_greedy`.
        adapters: for each name its rank and the layers that it changes.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = Adapters()
    with torch.inference_mode():
        made.tokens["base"] = generate(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), prompts, length)
    for seed, (name, (rank, layers)) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers), init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
        made.folders[name] = str(folder / name)
        model.save_pretrained(made.folders[name], save_embedding_layers=False)
        with torch.inference_mode():
            made.tokens[name] = generate(model, prompts, length)
            made.merged[name] = generate(model.merge_and_unload(), prompts, length)
    return made


def side_by_side(adapters, prompts, names, sampling):
    """A run with each prompt for each of the adapters, in one batch, and what it must say."""
    asked = [(ids, name, adapters.tokens[name][i]) for i, ids in enumerate(prompts) for name in names]
    folders = [adapters.folders.get(name) for _, name, _ in asked]
    run = {"prompts": [ids for ids, _, _ in asked], "adapters": folders, "sampling": sampling}
    return run, [said for _, _, said in asked]


def spoil(folder, source):
    """Copy an adapter with one value that is not a number. Returns the folder."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(tensors[name] for name in sorted(tensors) if "lora_B" in name)[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)
