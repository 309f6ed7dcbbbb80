# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weights alone are quantised, in the forms that compressed-tensors, GPTQ and AWQ write, and the model that they stand for."""

import json

import torch

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight output features lies at each place of an int32, from the lowest bits on."""


def quantised(weight, bits, *, symmetric, group):
    """Of a weight `[N, K]`: whole numbers without a sign `[N, K]`, scales `[N, G]` that bfloat16 holds, zero points `[N, G]`, and what they stand for."""
    outputs, inputs = weight.shape
    parts = weight.reshape(outputs, inputs // group, group)
    half, most = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        scale = (parts.abs().amax(-1) / (half - 1)).bfloat16().float()
        zero = torch.full_like(scale, half)
    else:
        low, high = parts.amin(-1), parts.amax(-1)
        scale = ((high - low) / most).bfloat16().float()
        zero = (-low / scale).round().clamp(0, most)
    numbers = (parts / scale[..., None] + zero[..., None]).round().clamp(0, most)
    stands_for = ((numbers - zero[..., None]) * scale[..., None]).reshape(outputs, inputs)
    return numbers.reshape(outputs, inputs).to(torch.int32), scale, zero.to(torch.int32), stands_for


def packed(values, bits, dim):
    """Whole numbers in int32, 32 / bits of them along a dimension in each, from the lowest bits on."""
    several = 32 // bits
    values = values.movedim(dim, -1).to(torch.int64)
    values = values.reshape(*values.shape[:-1], -1, several)
    together = (values << torch.arange(0, 32, bits)).sum(-1)
    return (
        torch.where(together >= 1 << 31, together - (1 << 32), together).to(torch.int32).movedim(-1, dim).contiguous()
    )


def compressed_tensors(name, numbers, scale, zero, bits, *, symmetric):
    zeros = {} if symmetric else {f"{name}.weight_zero_point": packed(zero, bits, 0)}
    shape = torch.tensor(numbers.shape)
    return {f"{name}.weight_packed": packed(numbers, bits, 1), f"{name}.weight_scale": scale, f"{name}.weight_shape": shape, **zeros}  # fmt: skip


def gptq(name, numbers, scale, zero, bits, *, symmetric):
    """Zero points are written less one."""
    groups = torch.arange(numbers.shape[1], dtype=torch.int32) // GROUP
    return {
        f"{name}.qweight": packed(numbers.T, bits, 0), f"{name}.scales": scale.T.contiguous(), f"{name}.qzeros": packed(zero.T - 1, bits, 1),
        f"{name}.g_idx": groups,
    }  # fmt: skip


def awq(name, numbers, scale, zero, bits, *, symmetric):
    def in_order(rows):
        return packed(rows.reshape(len(rows), -1, 8)[:, :, AWQ_ORDER].reshape(len(rows), -1), bits, 1)

    return {f"{name}.qweight": in_order(numbers.T), f"{name}.scales": scale.T.contiguous(), f"{name}.qzeros": in_order(zero.T)}  # fmt: skip


def config_of(form, bits, *, symmetric, channels):
    """`quantization_config` of a checkpoint's config.json."""
    if form is gptq:
        return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": symmetric}
    if form is awq:
        return {"quant_method": "awq", "bits": bits, "group_size": GROUP, "zero_point": not symmetric, "version": "gemm"}  # fmt: skip
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}  # fmt: skip
    weights |= {"strategy": "channel"} if channels else {"strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def make(folder, form, bits, *, symmetric, channels=False):
    """Write a small Qwen2, whose projections of queries, keys and values have a bias, with quantised projections: in groups, or with one scale for each output feature.

    Returns:
        The model that it stands for, in float32.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(6)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=500, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=128,
        max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
    )).float().eval()  # fmt: skip
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("_proj.weight"):
                if name.endswith("bias"):
                    tensor.normal_()
                tensor.copy_(tensor.bfloat16())
        model.save_pretrained(folder)
        quantise(model, folder, form, bits, symmetric=symmetric, channels=channels)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    return model


def quantise(model, folder, form, bits, *, symmetric, channels=False, **config):
    """Give the projections of a model the numbers that they are rounded to, and write its checkpoint, in one file, anew with them.

    Args:
        model: in float32.
        folder: of its checkpoint.
        form, bits, symmetric, channels: as of `make`.
        config: what else its `quantization_config` says.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    layers = {path: layer for path, layer in model.named_modules() if path.endswith("_proj") and ".layers." in path}
    for path, layer in layers.items():  # some files have an older name for a part of the model
        stored = path if f"{path}.weight" in tensors else path.replace("model.language_model.", "model.")
        weight = layer.weight
        group = weight.shape[1] if channels else GROUP
        numbers, scale, zero, stands_for = quantised(weight, bits, symmetric=symmetric, group=group)
        weight.copy_(stands_for)
        del tensors[f"{stored}.weight"]
        tensors |= form(stored, numbers, scale.bfloat16(), zero, bits, symmetric=symmetric)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((folder / "config.json").read_text())
    whole["quantization_config"] = config_of(form, bits, symmetric=symmetric, channels=channels) | config
    (folder / "config.json").write_text(json.dumps(whole))
