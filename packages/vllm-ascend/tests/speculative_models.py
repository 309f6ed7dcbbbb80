# SPDX-License-Identifier: Apache-2.0
"""Drafts for tests."""

import json
import shutil

__all__ = ["PROMPTS", "first_layers", "llama_with_drafts", "with_next_token_layer"]


def first_layers(folder, target, count):
    """The first layers of a checkpoint, with its embedding and its head, as a checkpoint in `target`."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    weights = load_file(folder / "model.safetensors")
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < count
    }
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


VOCABULARY, HIDDEN, DRAFT_VOCABULARY, MEDUSA_HEADS = 500, 64, 300, 3
PROMPTS = [[(7 * i * i + 3 * k) % VOCABULARY for i in range(5 + 29 * k)] for k in range(6)]
QUIET, ATTENTIVE = 0.005, 60


def quiet(model):
    """Let the layers of a random model add little to the embedding, so that the next token depends on the last one for the most part, and can be drafted."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            weight.mul_(QUIET)


def save(folder, config, weights):
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: one.contiguous() for name, one in weights.items()}, folder / "model.safetensors")
    return folder


def llama_with_drafts(root, hugging_face, length):
    """A random Llama: its folder, and Hugging Face's tokens for `PROMPTS`; and by method the folder of a draft for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.inference_mode():
        model = LlamaForCausalLM(config).float().eval()
        quiet(model)
        model.save_pretrained(root / "target")
        tokens = hugging_face(model, PROMPTS, length)
        one = json.loads((root / "target" / "config.json").read_text()) | {"num_hidden_layers": 1}
        layer = {
            name.removeprefix("model."): weight
            for name, weight in model.state_dict().items()
            if name.startswith("model.layers.0.")
        }
        drafts = {
            "eagle": save(root / "eagle", one, eagle(layer)),
            "eagle3": save(root / "eagle3", *eagle3(one, layer, model)),
            "medusa": save(root / "medusa", *medusa(model)),
        }
    return root / "target", tokens, drafts


def eagle(layer):
    """One layer over the embedding of the token that was sampled; the hidden state beside it has a small part, and what attention sees a large one."""
    import torch

    layer = layer | {"layers.0.self_attn.o_proj.weight": ATTENTIVE * layer["layers.0.self_attn.o_proj.weight"]}
    fused = torch.cat((torch.eye(HIDDEN), 0.01 * torch.randn(HIDDEN, HIDDEN)), dim=1)
    return {"fc.weight": fused} | {name: one for name, one in layer.items() if "input_layernorm" not in name}


def eagle3(config, layer, model):
    """One layer whose attention sees its own token for the most part and hands its embedding on, with a vocabulary of its own."""
    import torch

    config = config | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_VOCABULARY}
    heads, kv_heads, size = 4, 2, 64
    zeros = torch.zeros(heads * size, HIDDEN)
    own = 0.5 * torch.randn(kv_heads * size, HIDDEN)
    query = own.view(kv_heads, size, HIDDEN).repeat_interleave(heads // kv_heads, 0).reshape(-1, HIDDEN)
    attention = {
        "q_proj": torch.cat((query, zeros), 1),
        "k_proj": torch.cat((own, zeros[: kv_heads * size]), 1),
        "v_proj": torch.cat((torch.eye(HIDDEN).repeat(kv_heads, 1), zeros[: kv_heads * size]), 1),
        "o_proj": torch.eye(HIDDEN).repeat(1, heads) / heads,
    }
    said = torch.randperm(VOCABULARY)[:DRAFT_VOCABULARY].sort().values
    weights = {f"midlayer.self_attn.{name}.weight": one for name, one in attention.items()}
    weights |= {name.replace("layers.0.", "midlayer."): one for name, one in layer.items() if "self_attn" not in name}
    weights |= {
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "fc.weight": 0.01 * torch.randn(HIDDEN, 3 * HIDDEN),
        "lm_head.weight": model.lm_head.weight[said],
        "d2t": said - torch.arange(DRAFT_VOCABULARY),
    }
    return config, weights


def medusa(model):
    """Heads that know by heart which tokens follow each token, if layers added nothing."""
    import torch

    embedding = torch.nn.functional.rms_norm(model.model.embed_tokens.weight, (HIDDEN,))
    following = (embedding @ model.lm_head.weight.t()).argmax(-1)
    config = {
        "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_heads": MEDUSA_HEADS,
        "num_hidden_layers": 1,
    }  # fmt: skip
    weights, said = {}, following
    for head in range(MEDUSA_HEADS):
        said = following[said]
        weights[f"blocks.{head}.layers.0.weight"] = torch.zeros(HIDDEN, HIDDEN)
        weights[f"lm_heads.{head}.weight"] = torch.zeros(VOCABULARY, HIDDEN).index_add_(0, said, embedding)
    return config, weights


def with_next_token_layer(root, name, kind, config, hugging_face, prompts, length):
    """A random model whose checkpoint has one layer more, which drafts (multi-token prediction): its folder, and Hugging Face's tokens without it.

    Args:
        root: where its folder is made.
        name: of the folder.
        kind: its class in transformers.
        config: its config, without that layer.
        hugging_face: `conftest.hugging_face_greedy`.
        prompts: of tokens.
        length: tokens of an answer.
    """
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(6)
    layers = config.num_hidden_layers
    with torch.inference_mode():
        config.num_hidden_layers = layers + 1
        whole = kind(config).float().eval()
        quiet(whole)
        path = f"model.layers.{layers}"
        config.num_hidden_layers = layers
        model = kind(config).float().eval()
        model.load_state_dict({key: one for key, one in whole.state_dict().items() if not key.startswith(path)})
        whole.save_pretrained(root / f"{name} in one")  # experts have names of their own in files
        weights = load_file(root / f"{name} in one" / "model.safetensors")
        tokens = hugging_face(model, prompts, length)
        weights |= {f"{path}.{norm}.weight": torch.ones(HIDDEN) for norm in ("enorm", "hnorm", "shared_head.norm")}
        weights[f"{path}.self_attn.o_proj.weight"] *= ATTENTIVE
        weights[f"{path}.eh_proj.weight"] = torch.cat((torch.eye(HIDDEN), 0.01 * torch.randn(HIDDEN, HIDDEN)), 1)
        weights[f"{path}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"{path}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
        config.architectures = [kind.__name__]
        saved = json.loads(config.to_json_string(use_diff=False)) | {"num_nextn_predict_layers": 1}
        return save(root / name, saved, weights), tokens
