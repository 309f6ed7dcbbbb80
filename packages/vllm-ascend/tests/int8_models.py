# SPDX-License-Identifier: Apache-2.0
"""Models whose products are int8 arithmetic, layer by layer as a W8A8 checkpoint says, and such checkpoints with static scales."""

import json

import torch
from rounding import load
from torch import nn

PROMPTS = [[(13 * i * i + 7 * k) % 500 for i in range(9 + 17 * k)] for k in range(7)]


class Int8Linear(nn.Module):
    """A linear layer of a checkpoint, its product in whole numbers: float32 has room for them up to 2^24, which 1040 inputs cannot exceed.

    `parts` is the number of tensor parallel ranks that the inputs are divided over. Each scales its own part of a token, and each partial
    product is rounded to the model's dtype.
    """

    def __init__(self, tensors, path, parts=1):
        super().__init__()
        self.of, self.parts = {}, parts
        for name, tensor in tensors.items():
            layer, _, end = name.rpartition(".")
            if layer == path:
                is_bits = end == "deq_scale" and tensor.dtype == torch.int64
                self.of[end] = tensor.to(torch.int32).view(torch.float32) if is_bits else tensor.float()

    def forward(self, x):
        weights = self.of["weight"].chunk(self.parts, dim=1)
        partial = [self.product(part, w) for part, w in zip(x.float().chunk(self.parts, dim=-1), weights, strict=True)]
        if "deq_scale" in self.of:
            partial[0] = partial[0] + self.of["quant_bias"] * self.of["deq_scale"]
        elif "bias" in self.of:
            partial[0] = partial[0] + self.of["bias"]
        return sum(part.to(x.dtype) for part in partial)

    def product(self, x, weight):
        of = self.of
        if "deq_scale" in of:
            rounded = (x / of["input_scale"] + of["input_offset"]).round().clamp(-128, 127)
            return (rounded @ weight.T) * of["deq_scale"]
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() @ weight.T * scale * of["weight_scale"].T


class Int8Experts(nn.Module):
    """Qwen3-MoE's block: each token through its experts, one after the other."""

    def __init__(self, tensors, path, router, top_k, parts=1):
        super().__init__()
        self.register_buffer("router", router)
        self.top_k = top_k
        self.experts = [
            [Int8Linear(tensors, f"{path}.experts.{expert}.{name}") for name in ("gate_proj", "up_proj")]
            + [Int8Linear(tensors, f"{path}.experts.{expert}.down_proj", parts)]
            for expert in range(len(router))
        ]

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = nn.functional.linear(rows, self.router).float().softmax(-1).topk(self.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        output = torch.zeros_like(rows)
        for expert, (gate, up, down) in enumerate(self.experts):
            row, place = (ids == expert).nonzero(as_tuple=True)
            own = rows[row]
            output[row] += weights[row, place, None] * down(nn.functional.silu(gate(own)) * up(own))
        return output.view_as(x)


def int8_model(source, folder, parts=1):
    """The model of `source` in bfloat16, with the layers of its W8A8 checkpoint in `folder` in the place of its own."""
    from safetensors.torch import load_file

    model = load(source)
    tensors = load_file(folder / "quant_model_weights.safetensors")
    for path in [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and path != "lm_head"]:
        if tensors[f"{path}.weight"].dtype == torch.int8:
            divided = path.endswith(("o_proj", "down_proj"))
            model.set_submodule(path, Int8Linear(tensors, path, parts if divided else 1))
    for index, layer in enumerate(model.model.layers):
        if hasattr(model.config, "num_experts"):
            path = f"model.layers.{index}.mlp"
            router = tensors[f"{path}.gate.weight"].bfloat16()
            layer.mlp = Int8Experts(tensors, path, router, model.config.num_experts_per_tok, parts)
    return model


def quantise_statically(model, source, folder, prompts):
    """A W8A8 checkpoint of `source` in ModelSlim's format: inputs with a scale and an offset of the layer, from what `prompts` give."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    ends = {}

    def note(path, x):
        low, high = ends.get(path, (0.0, 0.0))
        ends[path] = min(low, x.min().item()), max(high, x.max().item())

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: note(path, inputs[0]))
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.inference_mode():
        for ids in prompts:
            model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    written, kinds = {}, {"model_quant_type": "W8A8"}
    for name, tensor in load_file(source / "model.safetensors").items():
        path, _, end = name.rpartition(".")
        if end != "weight" or path not in ends or path == "lm_head":
            written[name], kinds[name] = tensor, "FLOAT"
            continue
        low, high = ends[path]
        input_scale = (high - low) / 255
        input_offset = float(round(-128 - low / input_scale))
        weight_scale = tensor.double().abs().amax(1) / 127
        weight = (tensor.double() / weight_scale[:, None]).round()
        deq_scale = input_scale * weight_scale
        bias = model.get_submodule(path).bias
        quant_bias = (0 if bias is None else bias.double() / deq_scale) - input_offset * weight.sum(1)
        layer = {
            "weight": weight.to(torch.int8),
            "input_scale": torch.tensor([input_scale]),
            "input_offset": torch.tensor([input_offset]),
            "deq_scale": deq_scale.float(),
            "quant_bias": quant_bias.detach().round().to(torch.int32),
        }
        for part, value in layer.items():
            written[f"{path}.{part}"], kinds[f"{path}.{part}"] = value, "W8A8"
        if path.endswith("down_proj"):  # as a float16 model has it
            written[f"{path}.deq_scale"] = layer["deq_scale"].view(torch.int32).to(torch.int64)
    save_file(written, folder / "quant_model_weights.safetensors", metadata={"format": "pt"})
    (folder / "quant_model_description.json").write_text(json.dumps(kinds))
    return folder
