# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of the kinds that features need, and what Hugging Face transformers says with each.

models.main(kind, folder) writes the checkpoint and `reference.json` into the folder. Of several prompts of a length the one is taken whose tokens are the
most certain, so that another order of summation, or another rank's int8 scales, cannot change them.
"""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import weight_only_models
from int8_models import Int8Linear, int8_model
from lora_adapters import ALL
from pooling_models import save_tokenizer
from rounding import OtherOrder

TOKENS = 8
LENGTHS = (5, 40, 129, 150)  # within a block of the cache (128), one token more, and beyond
CANDIDATES, VOCABULARY = 32, 500
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 128,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
INT4 = {"form": weight_only_models.compressed_tensors, "bits": 4, "symmetric": False}
OF_TOWERS = ("qkv", "proj", "fc1", "fc2", "0", "2")  # stay in float beside int8 layers
# How much larger than Hugging Face's errors in bfloat16 those of vectors may be. float32 rounds 16 bits later, in each of at most 512 sums (test_pooling.py). An int8 model's other
# operations are in bfloat16 as well, with errors of their own.
IN_FLOAT32, IN_INT8 = 512 * 2**-16, 2
SEED = 4


def random_model(experts):
    import transformers

    torch.manual_seed(SEED)
    name = "Qwen3Moe" if experts else "Qwen3"
    config = getattr(transformers, f"{name}Config")(**SIZES, **(EXPERTS if experts else {}))
    return getattr(transformers, f"{name}ForCausalLM")(config).float().eval()


def said(model, ids):
    """Greedy tokens after each of the prompts `[N, T]`, and the least lead that one of them had over the next likely token."""
    ids = torch.tensor(ids)
    start, leads = ids.shape[1], []
    for _ in range(TOKENS):
        best = model(ids, use_cache=False).logits[:, -1].float().topk(2)
        leads.append(best.values[:, 0] - best.values[:, 1])
        ids = torch.cat((ids, best.indices[:, :1]), 1)
    return ids[:, start:].tolist(), torch.stack(leads).amin(0)


def prompts_for(models):
    """A prompt of each length for which the least lead of all models is the largest, of prompts to which those in a group say the same; and each one's tokens.

    Args:
        models: groups of models.
    """
    prompts, tokens = [], [[] for _ in models]
    for length in LENGTHS:
        asked = [
            [(7 * i * i + 31 * k * i + 3 * k) % (VOCABULARY - 3) + 3 for i in range(length)] for k in range(CANDIDATES)
        ]
        answers = [[said(model, asked) for model in group] for group in models]
        lead = torch.stack([leads for group in answers for _, leads in group]).amin(0)
        for group in answers:
            lead[[any(other[k] != group[0][0][k] for other, _ in group) for k in range(CANDIDATES)]] = -1
        best = int(lead.argmax())
        assert lead[best] > 0, f"no prompt of {length} tokens is answered alike"
        prompts.append(asked[best])
        for mine, group in zip(tokens, answers, strict=True):
            mine.append(group[0][0][best])
    return prompts, tokens


def vectors(model, inputs):
    """The hidden state of the last token of each prompt, of length 1, in float64."""
    states = [model.base_model(**one, use_cache=False).last_hidden_state[0, -1].double() for one in inputs]
    return torch.stack([state / state.norm() for state in states])


def error_in_bfloat16(models, exact, inputs):
    """The largest distance from the exact vectors of models in bfloat16, each in three orders of summation."""
    found = []
    for model in models:
        for seed in range(3):
            with OtherOrder(seed):
                found.append((vectors(model, inputs) - exact).norm(dim=1).max().item())
    return max(found)


def write(folder, requests, tokens, exact, bound, **more):
    """Write what each request must be answered, and how far vectors may be from theirs."""
    reference = {"requests": requests, "tokens": tokens, "vectors": exact.tolist(), "bound": bound, **more}
    (folder / "reference.new").write_text(json.dumps(reference))
    (folder / "reference.new").replace(folder / "reference.json")


def of_text(folder, experts):
    """A model of text, and an adapter for it."""
    model = random_model(experts)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    answered(model, folder)


def answered(model, folder):
    """Write an adapter for a model in float32, and what is said with and without it."""
    adapted = with_adapter(model, folder)
    prompts, (base, changed) = prompts_for([[model], [adapted]])
    inputs = [{"input_ids": torch.tensor([ids])} for ids in prompts]
    exact = vectors(model, inputs)
    bound = IN_FLOAT32 * error_in_bfloat16([model.bfloat16()], exact, inputs)
    write(folder, [{"ids": ids} for ids in prompts], base, exact, bound, adapter={"tokens": changed})


def with_adapter(model, folder):
    """A copy of a model with an adapter, which is written into the model's folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED + 1)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=list(ALL[:4]), init_lora_weights=False)
    adapted = get_peft_model(deepcopy(model), config).eval()
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return adapted


def of_int8(folder, experts):
    """The same in int8. Over two ranks a part of each layer's inputs has scales of its own. Prompts are those to which rounding to bfloat16 makes no difference."""
    from ascend_sim.checkpoints import quantise

    source, model = folder / "float", random_model(experts)
    model.save_pretrained(source)
    quantise(source, folder / "int8", keep_float=("lm_head",))
    save_tokenizer(folder / "int8")
    adapter = with_adapter(model, folder)

    def as_served(*, adapted):
        made = [int8_model(source, folder / "int8", parts).eval() for parts in (1, 2)]
        if adapted:
            for one in made:
                add_adapter(one, adapter)
        return [*(deepcopy(one).float() for one in made), *made]

    plain = as_served(adapted=False)
    prompts, (tokens, changed) = prompts_for([plain, as_served(adapted=True)])
    one = plain[0]
    inputs = [{"input_ids": torch.tensor([ids])} for ids in prompts]
    exact = vectors(one, inputs)
    bound = IN_INT8 * error_in_bfloat16(plain[2:], exact, inputs)
    write(folder, [{"ids": ids} for ids in prompts], tokens, exact, bound, adapter={"tokens": changed})


class Adapted(torch.nn.Module):
    """A layer of any kind and what an adapter, of peft's layer, adds to it."""

    def __init__(self, layer, added):
        super().__init__()
        self.layer, self.scale = layer, added.scaling["default"]
        self.down, self.up = deepcopy(added.lora_A["default"]).bfloat16(), deepcopy(added.lora_B["default"]).bfloat16()

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x)) * self.scale


def add_adapter(model, adapter):
    """Put the adapter of peft's model to layers that peft does not know."""
    for path, added in adapter.base_model.model.named_modules():
        if hasattr(added, "lora_A"):
            model.set_submodule(path, Adapted(model.get_submodule(path), added))


def of_int4(folder, experts):
    """A model of text with weights of 4 bits. Experts of 4 bits are refused by their config, so theirs stay as they are."""
    model = random_model(experts)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    weight_only_models.quantise(model, folder, **INT4)
    answered(model, folder)


def with_pictures(experts):
    """The zoo's Qwen2-VL; with experts a Qwen3-VL-MoE."""
    from zoo import ENTRIES
    from zoo.multimodal import QWEN_IMAGE, entry, qwen3_vl

    def sparse():
        processor, config = qwen3_vl()
        text = config["text_config"] | EXPERTS | {"decoder_sparse_step": 1}
        return processor, config | {"text_config": text}

    if not experts:
        return ENTRIES["Qwen2VL"]
    return replace(entry("Qwen3VLMoe", sparse, QWEN_IMAGE), turned_experts=True)


def of_pictures(folder, experts, int8, int4):
    from zoo import reference

    source = folder / "float" if int8 else folder
    source.mkdir(exist_ok=True)
    model, requests, more = reference.checkpoint(with_pictures(experts), source)
    if int8:
        model = int8_language_model(source, folder, model)
    if int4:
        weight_only_models.quantise(model, folder, **INT4, ignore=["lm_head", "re:.*visual.*"])
    ids = [request["expanded"] for request in requests]
    tokens = [reference.greedy(model, *both)[0][:TOKENS] for both in zip(ids, more, strict=True)]
    inputs = [reference.inputs_of(model, *both) for both in zip(ids, more, strict=True)]
    exact = vectors(model, inputs)
    model = model.bfloat16()
    if int8:
        tokens = [decided(model, *each) for each in zip(ids, more, tokens, strict=True)]
        assert sum(bool(said and request["media"]) for said, request in zip(tokens, requests, strict=True)) > 1
    inputs = [reference.inputs_of(model, *both) for both in zip(ids, more, strict=True)]
    bound = (IN_INT8 if int8 else IN_FLOAT32) * error_in_bfloat16([model], exact, inputs)
    write(folder, requests, tokens, exact, bound)


def decided(model, ids, more, tokens):
    """The first tokens of an answer whose lead over any other is more than twice what other orders of summation change of the model's logits in bfloat16."""
    from zoo.reference import logits_of

    def logits():
        return logits_of(model, ids + tokens[:-1], more)[len(ids) - 1 :].float()

    mine, moved = logits(), 0
    for seed in range(3):
        with OtherOrder(seed):
            moved = torch.maximum((logits() - mine).abs().amax(-1), torch.as_tensor(moved))
    best = mine.topk(2)
    good = (best.indices[:, 0] == torch.tensor(tokens)) & (best.values[:, 0] - best.values[:, 1] > 2 * moved)
    return tokens[: good.long().cumprod(0).sum()]


def int8_language_model(source, folder, model):
    """The model with the language model's layers in int8, and its checkpoint."""
    import shutil

    from ascend_sim.checkpoints import quantise
    from safetensors.torch import load_file

    quantise(source, folder / "int8", keep_float=(*OF_TOWERS, "lm_head"))
    for file in source.glob("*"):
        if file.suffix in (".json", ".jinja", ".npy") and not (folder / "int8" / file.name).exists():
            shutil.copy(file, folder / "int8")
    for file in source.glob("*.npy"):
        shutil.copy(file, folder)
    tensors = load_file(folder / "int8" / "quant_model_weights.safetensors")
    layers = [
        path for path, layer in model.named_modules() if ".layers." in path and isinstance(layer, torch.nn.Linear)
    ]
    for path in layers:  # of the language model, whose tensors have its older name in files
        stored = path if f"{path}.weight" in tensors else path.replace("model.language_model.", "model.")
        model.set_submodule(path, Int8Linear(tensors, stored))
    return model.eval()


def checkpoint(kind, folder):
    """Where the checkpoint of a kind lies in its folder."""
    return Path(folder) / "int8" if "int8" in kind else Path(folder)


def main(kind, folder):
    torch.set_num_threads(1)
    folder, needs = Path(folder), kind.split(", ")
    with torch.inference_mode():
        if "pictures" in needs:
            of_pictures(folder, "experts" in needs, "int8" in needs, "int4" in needs)
        elif "int4" in needs:
            of_int4(folder, "experts" in needs)
        elif "int8" in needs:
            of_int8(folder, "experts" in needs)
        else:
            of_text(folder, "experts" in needs)
