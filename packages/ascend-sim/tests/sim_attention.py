# SPDX-License-Identifier: Apache-2.0
"""Attention of one request in float64, and how far float32 arithmetic may be from it, whatever the order of its sums.

Legend: T query tokens, S keys, N heads, D size of a key, V size of a value.
"""

import math
from dataclasses import dataclass

import torch
from sim_bounds import FUNCTION, bound, gamma
from torch import Tensor

__all__ = ["Attention", "attend"]


@dataclass(frozen=True)
class Attention:
    """A result and its log-sum-exp (infinite where nothing is seen), each with what float32 may add to it: `[T, N, V]` and `[T, N]`."""

    out: Tensor
    lse: Tensor
    out_error: Tensor
    lse_error: Tensor

    def allowed(self, dtype: torch.dtype) -> Tensor:
        """The bound of the result in `dtype`, stored once."""
        return self.out_error + bound(self.out, dtype, steps=0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, unseen: Tensor | None = None, sink: Tensor | None = None
) -> Attention:
    """One request.

    A score is a sum of D products after the query was scaled, off by gamma(D + 1) times the products' magnitudes. Its exponential, after the largest score
    was subtracted, is off by that much relatively (an error of the largest score itself divides out), by the rounding of the difference, and by the
    function's own error. The weighted sum of values and the sum of weights add S roundings each, the division two.

    Args:
        query: `[T, N, D]`.
        key, value: `[S, heads of keys, D]` and `[S, heads of keys, V]`; N is a multiple of their heads.
        scale: of the scores.
        unseen: bool `[T, S]`, True where a token does not see a key.
        sink: `[N]`, one more score for each head, without a value.
    """
    group = query.size(1) // key.size(1)
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    query = query.double()
    scores = torch.einsum("qhd,khd->qhk", query, key) * scale
    error = gamma(query.size(-1) + 1) * torch.einsum("qhd,khd->qhk", query.abs(), key.abs()) * abs(scale)
    if unseen is not None:
        scores = scores.masked_fill(unseen[:, None], -math.inf)
        error = error.masked_fill(unseen[:, None], 0)
    if sink is not None:
        scores = torch.cat((scores, sink.double().view(1, -1, 1).expand(scores.size(0), -1, 1)), -1)
        error = torch.cat((error, torch.zeros_like(error[..., :1])), -1)
        value = torch.cat((value, torch.zeros_like(value[:1])))
    if not scores.size(-1):
        nothing = torch.zeros(*scores.shape[:2], value.size(-1), dtype=torch.float64)
        lse = torch.full(scores.shape[:2], math.inf, dtype=torch.float64)
        return Attention(nothing, lse, nothing, torch.zeros_like(lse))
    lse, most = scores.logsumexp(-1), scores.amax(-1)
    empty = torch.isneginf(lse)
    below = (scores - most.masked_fill(empty, 0)[..., None]).abs()
    weights = (scores - lse.masked_fill(empty, 0)[..., None]).exp()
    relative = torch.where(weights > 0, error + gamma(1) * below + gamma(FUNCTION), 0).amax(-1)
    summed = gamma(2 * scores.size(-1) + 4)
    magnitude = torch.einsum("qhk,khd->qhd", weights, value.abs())
    out = torch.einsum("qhk,khd->qhd", weights, value)
    lse_error = (
        error.amax(-1) + relative + summed + gamma(2 + FUNCTION) * (most.abs() + lse.abs()).masked_fill(empty, 0)
    )
    return Attention(
        out, lse.masked_fill(empty, math.inf), (2 * relative + 2 * summed)[..., None] * magnitude, lse_error
    )
