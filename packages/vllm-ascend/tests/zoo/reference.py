# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of an entry, and what Hugging Face transformers answers with it.

reference.main(name, folder) writes the checkpoint, `requests.json` and `reference.json` into the folder.
"""

import json
import zlib
from pathlib import Path

from zoo import media

PROMPT_LENGTHS = (3, 37, 140, 200)  # within and beyond a block of the cache (128) and a window (32)
NEW_TOKENS = 20
POSITIONS = 120  # of each prompt at most, for the comparison in bfloat16


def randomise(model, seed):
    """Weights that let every parameter matter: products keep the scale of their input, norms and biases differ from 1 and 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    state = dict(model.named_parameters()) | {
        name: value for name, value in model.named_buffers() if name.endswith(("correction_bias", "expert_bias"))
    }
    for value in state.values():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        value.data = value.data + 0.1 * noise if value.dim() < 2 else noise * 1.2 * value.shape[-1] ** -0.5
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        embedding.weight.data *= 0.05  # else the last token is the most likely next one, whatever the layers do
    return model


def build(entry, sizes, specials=0):
    """The model with random weights, in float32. The first `specials` tokens are never the most likely ones."""
    import transformers

    config = getattr(transformers, entry.config)(**sizes)
    model = getattr(transformers, entry.model)._from_config(config, attn_implementation=entry.attention)
    randomise(model.float().eval(), zlib.crc32(entry.model.encode()))
    model.get_output_embeddings().weight.data[:specials] = (
        0  # a model that says "here is a picture" would have to be given one
    )
    return model


def text_requests(vocabulary):
    return [
        {"ids": [3 + (7 * i * i + 31 * k * i + k) % (vocabulary - 3) for i in range(length)]}
        for k, length in enumerate(PROMPT_LENGTHS)
    ]


def media_requests(entry, processor, folder):
    """The engine's requests, and of each what the model takes."""
    requests, inputs = [], []
    for text, names in media.texts(entry.mark, media.random_media(entry.task, folder)):
        given = media.for_transformers(entry.task, folder, names)
        made = dict(processor(text=[text], **given, return_tensors="pt"))
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        requests.append({"ids": processor.tokenizer(text)["input_ids"], "media": names, "expanded": ids})
        inputs.append(made)
    return requests, inputs


def encoded_requests(entry, processor, folder):
    """As above for a model whose encoder takes one sound a request, and whose decoder begins with words."""
    requests, inputs = [], []
    for number, name in enumerate(media.random_media(entry.task, folder)):
        text = f"{entry.mark} {media.words(7 * number, 3 + 40 * number)}"
        ids = processor.tokenizer(text)["input_ids"]
        (sound,) = media.load(entry.task, folder, [name])
        made = processor.feature_extractor(sound, sampling_rate=media.SAMPLING_RATE, return_tensors="pt")
        requests.append({"ids": ids, "media": [name], "expanded": ids, "encoded": True})
        inputs.append({"input_features": made["input_features"], "decoder_input_ids": None})
    return requests, inputs


def logits_of(model, ids, more):
    """Logits `[tokens, vocabulary]` of one sequence, whose media are `more`."""
    import torch

    made = inputs_of(model, ids, more)
    with torch.inference_mode():
        return model(**made, use_cache=False).logits[0].float()


def inputs_of(model, ids, more):
    """Arguments of a model. What says for each token which kind it is goes on with text."""
    import torch

    made = {"decoder_input_ids" if "decoder_input_ids" in more else "input_ids": torch.tensor([ids])}
    for name, value in more.items():
        if value is None:
            continue
        if value.dim() == 2 and name in ("mm_token_type_ids", "token_type_ids"):
            value = torch.nn.functional.pad(value, (0, len(ids) - value.shape[1]))
        made[name] = value.to(model.dtype) if value.is_floating_point() else value
    return made


def greedy(model, ids, more):
    """Greedy tokens by a whole forward pass for each, without any cache; and the log-probabilities that they had."""
    ids, start = list(ids), len(ids)
    for _ in range(NEW_TOKENS):
        ids.append(int(logits_of(model, ids, more)[-1].argmax()))
    logprobs = logits_of(model, ids[:-1], more)[start - 1 :].log_softmax(-1)
    return ids[start:], [logprobs[i, token].item() for i, token in enumerate(ids[start:])]


def in_bfloat16(folder, entry, requests, inputs):
    """The log-probabilities of the requests' own tokens in float32, and the errors of several right computations in bfloat16."""
    import torch
    import transformers
    from rounding import ensemble, own_logprobs

    def load():
        eager = {"attn_implementation": entry.attention} | (
            {"experts_implementation": "eager"} if entry.experts else {}
        )
        return getattr(transformers, entry.model).from_pretrained(folder, dtype=torch.bfloat16, **eager).eval()

    ids = [request["expanded"] if inputs[n] else request["ids"][:POSITIONS] for n, request in enumerate(requests)]
    model = load()
    exact = own_logprobs(load().float(), [inputs_of(torch.ones(()), *both) for both in zip(ids, inputs, strict=True)])
    errors = ensemble(model, exact, [inputs_of(model, *both) for both in zip(ids, inputs, strict=True)])
    prompts = [
        {**request, "ids": request["ids"] if more else own}
        for request, own, more in zip(requests, ids, inputs, strict=True)
    ]
    return {"requests": prompts, "exact": exact.tolist(), "errors": errors.tolist()}


def rename(file, names):
    """Give the tensors of a checkpoint's file the names that published checkpoints have."""
    from safetensors.torch import load_file, save_file

    renamed = {}
    for name, tensor in load_file(file).items():
        old = next((old for old in names if name.startswith(old)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = tensor
    save_file(renamed, file, metadata={"format": "pt"})


def turn_experts(file):
    """Exchange inputs and outputs of the experts of a checkpoint's file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    turned = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if ".mlp.experts." in name}
    save_file(tensors | turned, file, metadata={"format": "pt"})


def checkpoint(entry, folder):
    """Write the entry's checkpoint, and its processor if it has one. Returns the model, the engine's requests, and of each what the model takes."""
    if entry.make is None:
        specials, sizes, requests = 0, entry.sizes, text_requests(entry.sizes["vocab_size"])
        inputs = [{} for _ in requests]
    else:
        processor, sizes = entry.make()
        processor.save_pretrained(folder)
        specials = 1 + max(processor.tokenizer.get_added_vocab().values())
        requests, inputs = (encoded_requests if entry.encodes else media_requests)(entry, processor, folder)
    model = build(entry, sizes, specials)
    model.save_pretrained(folder)
    if entry.published:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [entry.published]}, indent=1))
    if entry.names:
        rename(folder / "model.safetensors", entry.names)
    if entry.turned_experts:
        turn_experts(folder / "model.safetensors")
    return model, requests, inputs


def main(name, folder):
    import torch

    from zoo import ENTRIES

    torch.set_num_threads(1)
    entry, folder = ENTRIES[name], Path(folder)
    model, requests, inputs = checkpoint(entry, folder)
    answers = [
        greedy(model, request.get("expanded", request["ids"]), more)
        for request, more in zip(requests, inputs, strict=True)
    ]
    reference = {
        "requests": requests,
        "tokens": [tokens for tokens, _ in answers],
        "logprobs": [logprobs for _, logprobs in answers],
        "bfloat16": in_bfloat16(folder, entry, requests, inputs),
    }
    written = folder / "reference.new"
    written.write_text(json.dumps(reference))
    written.replace(folder / "reference.json")
