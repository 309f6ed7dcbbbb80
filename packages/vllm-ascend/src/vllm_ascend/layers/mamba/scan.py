# SPDX-License-Identifier: Apache-2.0
"""The recurrences of state-space models, in float32: `selective_scan` of Mamba, `state_space` of Mamba2.

With the decay exp(dt_t A) and the state h, both are

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t          y_t = h_t C_t + D x_t

(Gu and Dao, "Mamba", arXiv 2312.00752; Dao and Gu, "Transformers are SSMs", arXiv 2405.21060). A step of decoding is a request of one token. Longer
ones are cut into pieces of `PIECE` tokens, so that the number of operators does not grow with every token. A is negative: no factor exceeds 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PIECE", "selective_scan", "state_space", "sums_of_decays"]

PIECE = 64
"""Tokens that are computed at once."""


def selective_scan(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Mamba: a decay of its own for every channel and number of the state.

    Args:
        x: `[R, T, D]`.
        dt: `[R, T, D]`, positive.
        decay: A, `[D, N]`, negative.
        b: `[R, T, N]`.
        c: `[R, T, N]`.
        skip: D, `[D]`.
        state: `[R, D, N]`.

    Returns:
        y `[R, T, D]` and the state after the last token, in float32.
    """
    x, dt, decay, b, c, skip, state = (each.float() for each in (x, dt, decay, b, c, skip, state))
    outputs = []
    for x_piece, dt_piece, b_piece, c_piece in _pieces(x, dt, b, c):
        factors = torch.exp(dt_piece[..., None] * decay)  # [R, L, D, N]
        terms = (dt_piece * x_piece)[..., None] * b_piece[:, :, None]
        terms[:, 0] += factors[:, 0] * state
        states = _prefix_sums(factors, terms)
        outputs.append((states @ c_piece[..., None]).squeeze(-1) + skip * x_piece)
        state = states[:, -1]
    return torch.cat(outputs, dim=1), state


def _prefix_sums(factors: Tensor, terms: Tensor) -> Tensor:
    """States `h_t = factors_t h_{t-1} + terms_t` along dimension 1, for h_{-1} = 0, in log2(L) rounds (Hillis and Steele, 1986)."""
    reach, length = 1, terms.shape[1]
    while reach < length:
        added = factors[:, reach:] * terms[:, :-reach]
        terms = torch.cat([terms[:, :reach], terms[:, reach:] + added], dim=1)
        factors = torch.cat([factors[:, :reach], factors[:, reach:] * factors[:, :-reach]], dim=1)
        reach *= 2
    return terms


def state_space(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Mamba2: one decay for all of a head's state, so that the tokens of a piece meet in matrix products.

    Args:
        x: `[R, T, H, P]`.
        dt: `[R, T, H]`, positive.
        decay: A, `[H]`, negative.
        b: `[R, T, G, N]`, each group's for H / G heads that follow one another.
        c: `[R, T, G, N]`.
        skip: D, `[H]`.
        state: `[R, H, P, N]`.

    Returns:
        y `[R, T, H, P]` and the state after the last token, in float32.
    """
    x, dt, decay, b, c, skip, state = (each.float() for each in (x, dt, decay, b, c, skip, state))
    heads = x.shape[2] // b.shape[2]
    outputs = []
    for x_piece, dt_piece, b_piece, c_piece in _pieces(x, dt, b, c):
        from_state, between, to_state = sums_of_decays((dt_piece * decay).transpose(1, 2))
        # [R, H, L, ...]
        given = (x_piece * dt_piece[..., None]).transpose(1, 2)
        b_heads, c_heads = (each.repeat_interleave(heads, 2).transpose(1, 2) for each in (b_piece, c_piece))
        read = (c_heads @ b_heads.transpose(2, 3)) * between
        y = read @ given + (c_heads @ state.transpose(2, 3)) * from_state[..., None]
        outputs.append(y.transpose(1, 2) + skip[:, None] * x_piece)
        kept = state * from_state[..., -1, None, None]
        state = kept + (given * to_state[..., None]).transpose(2, 3) @ b_heads
    return torch.cat(outputs, dim=1), state


def sums_of_decays(logarithms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much is left of what came earlier.

    Args:
        logarithms: `[..., L]`, of each token's decay.

    Returns:
        Of the state before the piece at each token `[..., L]`; of token s at token t `[..., t, s]`, zero for s > t; of each token
        after the piece `[..., L]`.
    """
    sums = logarithms.cumsum(-1)
    length = sums.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=sums.device).triu(1)
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, float("-inf")).exp()
    return sums.exp(), between, (sums[..., -1:] - sums).exp()


def _pieces(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(torch.split(each, PIECE, dim=1) for each in tensors), strict=True)
