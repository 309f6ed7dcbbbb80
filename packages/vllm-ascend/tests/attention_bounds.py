# SPDX-License-Identifier: Apache-2.0
"""Attention of one request in float64, and how far a result in bfloat16 may be from it.

Legend: T query tokens, S keys, N heads, D size of a key, V size of a value.
"""

import torch

__all__ = ["attend", "causal", "gamma"]

EXPONENTIAL = 8  # roundings that stand for one exp or log in float32: 4 units in the last place


def gamma(roundings, dtype=torch.float32):
    """What so many roundings do to a number, relatively (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3)."""
    change = roundings * torch.finfo(dtype).eps / 2
    return change / (1 - change)


def causal(tokens, keys, window=None):
    """bool `[T, S]`, True where a query token does not see a key. The last T tokens of S; of a window of W keys the last is the token's own."""
    position, key = torch.arange(tokens)[:, None] + keys - tokens, torch.arange(keys)[None]
    unseen = key > position
    return unseen if window is None else unseen | (key <= position - window)


def attend(query, keys, values, scale, unseen, *, products=None, parts=1, cap=0, bias=None, sinks=None):
    """The result `[T, N, V]`, and the bound of the difference.

    Scores, their exponentials and the sums over keys are off by roundings in float32, in whatever order; the result is stored once. Where the keys were
    attended to in several parts, each part's result is stored as well, and its weight is the exponential of a difference of log-sum-exps.

    Args:
        query: `[T, N, D]`, exact in bfloat16, as are keys and values.
        keys: `[S, N, D]`.
        values: `[S, N, V]`.
        scale: of the scores.
        unseen: bool `[T, S]`.
        products: in a score; D if None.
        parts: of the keys.
        cap: scores become `cap * tanh(score / cap)`, which brings none further apart; 0: they stay.
        bias: `[N, T, S]`, added to the scores.
        sinks: `[N]`, a score of each head that has no value.
    """
    query, keys, values = (x.double() for x in (query, keys, values))
    products = products or query.shape[-1]
    scores = scale * torch.einsum("tnd,snd->nts", query, keys).masked_fill(unseen, -torch.inf)
    terms = scale * torch.einsum("tnd,snd->nts", query.abs(), keys.abs()).masked_fill(unseen, 0)
    changes = 0  # roundings of a score after its sum: a cap divides, multiplies and takes the tanh; a bias is a product and a sum
    if cap:
        scores, changes = (cap * (scores / cap).tanh()).masked_fill(unseen, -torch.inf), 2 + EXPONENTIAL
    if bias is not None:
        scores, terms, changes = scores + bias, terms + bias.abs(), changes + 2
    lse = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None, None])
    weights, most = (scores - lse).exp(), scores.amax(-1, keepdim=True)
    out = torch.einsum("nts,snv->tnv", weights, values)
    magnitude = torch.einsum("nts,snv->tnv", weights, values.abs())
    below = (most - scores).masked_fill(unseen, 0)
    of_a_weight = gamma(products + 1 + changes) * terms + gamma(1) * below + gamma(EXPONENTIAL)
    of_a_sum = (of_a_weight.amax(-1, keepdim=True) + gamma(2 * len(keys) + 4)).movedim(0, 1)  # [T, N, 1]
    computed = 2 * of_a_sum * magnitude
    if parts > 1:
        of_the_lse = of_a_sum + gamma(2 + EXPONENTIAL) * (most.abs() + lse.abs()).movedim(0, 1)
        stored = gamma(1, torch.bfloat16) * (magnitude + computed)
        of_a_part = 2 * parts * of_the_lse + gamma(parts * (4 + EXPONENTIAL))
        computed = computed + stored + of_a_part * (magnitude + stored)
    return out, computed + gamma(1, torch.bfloat16) * (out.abs() + computed)
