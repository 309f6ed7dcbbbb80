# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule, in float32.

With the state S `[V, K]` of a head, its decay g and the strength beta of what is written,

    S_t = g_t S_{t-1} + u_t k_t^T        u_t = beta_t (v_t - g_t S_{t-1} k_t)        o_t = S_t q_t / sqrt(K)

(Yang, Kautz and Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464). Within a piece all u solve one system of equations with a lower triangular matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ascend.layers.mamba.scan import PIECE, sums_of_decays

__all__ = ["gated_delta_rule", "inverse_of_unit_lower", "normalized"]


def normalized(rows: Tensor) -> Tensor:
    """Rows of length 1, in float32. The models add 1e-6 to the square of the length."""
    rows = rows.float()
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and the state after the last token.

    Args:
        query: `[R, T, Hk, K]`, normalized; each head's for H / Hk heads of values that follow one another.
        key: `[R, T, Hk, K]`, normalized.
        value: `[R, T, H, V]`.
        decay: `[R, T, H]`, logarithms of g, not positive.
        beta: `[R, T, H]`.
        state: `[R, H, V, K]`.

    Returns:
        o `[R, T, H, V]` and the state, in float32.
    """
    heads = value.shape[2] // key.shape[2]
    query, key = (each.float().repeat_interleave(heads, 2) for each in (query, key))
    query = query * query.shape[-1] ** -0.5
    state = state.float()
    # [R, H, T, ...]
    tensors = [each.float().transpose(1, 2) for each in (query, key, value, decay, beta)]
    outputs = []
    for q, k, v, logarithms, strength in zip(*(torch.split(each, PIECE, dim=2) for each in tensors), strict=True):
        from_state, between, to_state = sums_of_decays(logarithms)
        k_strong = k * strength[..., None]
        system = ((k_strong @ k.transpose(2, 3)) * between).tril(-1)
        known = v * strength[..., None] - (k_strong @ state.transpose(2, 3)) * from_state[..., None]
        written = inverse_of_unit_lower(system) @ known
        read = (q @ k.transpose(2, 3)) * between
        outputs.append(read @ written + (q @ state.transpose(2, 3)) * from_state[..., None])
        kept = state * from_state[..., -1, None, None]
        state = kept + (written * to_state[..., None]).transpose(2, 3) @ k
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def inverse_of_unit_lower(strictly_lower: Tensor) -> Tensor:
    """Inverse of I + N for N strictly lower triangular, `[..., L, L]`.

    Blocks of the diagonal are inverted that double in size: of a block with inverted halves A and D and with C below, the inverse has -D C A below.
    That is substitution by blocks. The powers of N, whose sum the inverse is as well, would cancel one another after having grown.
    """
    length = strictly_lower.shape[-1]
    index = torch.arange(length, device=strictly_lower.device)
    inverse = torch.eye(length, device=strictly_lower.device, dtype=strictly_lower.dtype)
    size = 1
    while size < length:
        block, pair = index // size, index // (2 * size)
        below = (pair[:, None] == pair) & (block[:, None] > block)
        inverse = inverse - inverse @ (strictly_lower * below) @ inverse
        size *= 2
    return inverse.expand_as(strictly_lower)
