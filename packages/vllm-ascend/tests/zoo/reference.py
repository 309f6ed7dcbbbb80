# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of an entry, and what Hugging Face transformers answers with it.

reference.main(name, folder) writes the checkpoint, `requests.json` and `reference.json` into the folder.
"""

import json
import zlib
from pathlib import Path

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
    return model


def build(entry):
    """The model with random weights, in float32."""
    import transformers

    config = getattr(transformers, entry.config)(**entry.sizes)
    model = getattr(transformers, entry.model)._from_config(config, attn_implementation="eager")
    return randomise(model.float().eval(), zlib.crc32(entry.name.encode()))


def text_requests(vocabulary):
    return [
        {"ids": [3 + (7 * i * i + 31 * k * i + k) % (vocabulary - 3) for i in range(length)]}
        for k, length in enumerate(PROMPT_LENGTHS)
    ]


def logits_of(model, ids, more=None):
    """Logits `[tokens, vocabulary]` of one sequence."""
    import torch

    with torch.inference_mode():
        inputs = {"input_ids": torch.tensor([ids]), **(more or {})}
        return model(**inputs, use_cache=False).logits[0].float()


def greedy(model, ids, more=None):
    """Greedy tokens by a whole forward pass for each, without any cache; and the log-probabilities that they had."""
    ids, start = list(ids), len(ids)
    for _ in range(NEW_TOKENS):
        ids.append(int(logits_of(model, ids, more)[-1].argmax()))
    logprobs = logits_of(model, ids[:-1], more)[start - 1 :].log_softmax(-1)
    return ids[start:], [logprobs[i, token].item() for i, token in enumerate(ids[start:])]


def in_bfloat16(folder, entry, requests):
    """The log-probabilities of the requests' own tokens in float32, and the errors of several right computations in bfloat16."""
    import torch
    import transformers
    from rounding import ensemble, own_logprobs

    def load():
        eager = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if entry.experts else {})
        return getattr(transformers, entry.model).from_pretrained(folder, dtype=torch.bfloat16, **eager).eval()

    prompts = [request["ids"][:POSITIONS] for request in requests]
    exact = own_logprobs(load().float(), prompts)
    errors = ensemble(load(), exact, prompts)
    return {"prompts": prompts, "exact": exact.tolist(), "errors": errors.tolist()}


def main(name, folder):
    import torch
    from zoo import ENTRIES

    torch.set_num_threads(1)
    entry, folder = ENTRIES[name], Path(folder)
    model = build(entry)
    model.save_pretrained(folder)
    requests = text_requests(entry.sizes["vocab_size"])
    answers = [greedy(model, request["ids"]) for request in requests]
    reference = {
        "requests": requests,
        "tokens": [tokens for tokens, _ in answers],
        "logprobs": [logprobs for _, logprobs in answers],
    }
    reference["bfloat16"] = in_bfloat16(folder, entry, requests)
    (folder / "reference.json").write_text(json.dumps(reference))
