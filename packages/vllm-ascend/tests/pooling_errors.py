# SPDX-License-Identifier: Apache-2.0
"""How near the answers of models that embed, classify and score must be to transformers'.

Of every text the answer is a vector, or one for each of its tokens. Its error is its distance from the answer that transformers computes in
float64, in parts of that answer's length. In bfloat16 (strict mode) errors must be those of transformers' bfloat16, as `rounding.py` says. In
float32 (relaxed mode) they must be within what follows from transformers' errors in bfloat16: to the first order an answer's error is linear in
the roundings. Where bfloat16 rounds the result of an operation once, to 8 bits, float32 rounds to 24 bits each of the at most `TERMS` sums
that the result is made of: so it errs at most TERMS * 2**-16 times as much.
"""

import torch
from pooling_models import answers, build
from rounding import OtherOrder

TERMS = 512  # the longest sum of products: over the keys of a text, the inner width of an MLP, the vocabulary


def relative_errors(found, exact):
    """Distances from the exact answers, in parts of these, `[texts]` or `[tokens of all texts]`."""
    parts = [
        (answer.reshape(truth.shape) - truth).norm(dim=-1) / truth.norm(dim=-1)
        for answer, truth in zip(found, exact, strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in parts])


def in_bfloat16(case, prompts):
    """The exact answers of a model whose weights are in bfloat16, and the errors of transformers in bfloat16, `[members, texts or tokens]`."""
    model = build(case).bfloat16()
    exact = answers(case, model.double(), prompts)
    model = model.bfloat16()
    errors = []
    for seed in range(3):
        with OtherOrder(seed):
            errors.append(relative_errors(answers(case, model, prompts), exact))
    return exact, torch.stack(errors)


def float32_bound(errors):
    """Of the errors of transformers in bfloat16."""
    return TERMS * 2**-16 * errors.max()


def in_blocks(case):
    """Errors of a text's tokens have something in common, those of texts do not."""
    return 4 if case.task.startswith("token") else 1
