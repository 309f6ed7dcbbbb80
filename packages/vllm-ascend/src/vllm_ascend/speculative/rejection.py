# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling by operators of torch: what vLLM's Triton kernels of `v1/sample/rejection_sampler.py` compute, with their arguments.

B requests have drafted T tokens together, at most S each, from a vocabulary of V. The tokens of a request follow each other in the tensors of T; `ends` `[B]` are
cumulative. The algorithm is that of https://arxiv.org/abs/2211.17192: a drafted token is kept with the probability min(1, p / q), p being what the model gives it and q what the
draft gave it; after the first that is not kept one is drawn from what is left of the model's distribution, max(0, p - q).
Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expand", "rejection_greedy_sample", "rejection_random_sample", "requests_of", "sample_recovered_tokens"]


def requests_of(ends: Tensor, tokens: int) -> Tensor:
    """The request of each of `tokens` tokens, `ends` `[B]` being cumulative."""
    return torch.bucketize(torch.arange(tokens, device=ends.device, dtype=ends.dtype), ends, right=True)


def expand(
    output: Tensor, values: Tensor, ends: Tensor, replace_from: int, replace_to: int, MAX_NUM_TOKENS: int = 0  # noqa: N803  (the kernel's name)
) -> None:  # fmt: skip
    """The value of each token's request; `replace_to` in the place of `replace_from`.

    Args:
        output: `[T]`, written.
        values: `[B]`.
        ends: `[B]`.
        replace_from, replace_to: one value for another.
        MAX_NUM_TOKENS: unused, the Triton kernel's tile.
    """
    replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    output.copy_(replaced[requests_of(ends, output.shape[0])])


def sample_recovered_tokens(
    output: Tensor, ends: Tensor, drafts: Tensor, draft_probs: Tensor | None, probs: Tensor, inverse_noise: Tensor, *tiles: object
) -> None:  # fmt: skip
    """For each drafted token the one that stands in its place if it is not kept.

    Args:
        output: `[T]`, written.
        ends: `[B]`.
        drafts: `[T]`; -1 for one that must not be kept.
        draft_probs: `[T, V]`; None where the draft was certain of its tokens.
        probs: `[T, V]`, the model's.
        inverse_noise: `[B, V]`, 1 over exponentially distributed numbers: the token with the largest product is a sample.
        tiles: unused, the sizes and flags of the Triton kernel, which the tensors show.
    """
    if draft_probs is None:
        vocabulary = torch.arange(probs.shape[1], device=drafts.device, dtype=drafts.dtype)
        left = probs.masked_fill(vocabulary == drafts[:, None], 0)
    else:
        left = (probs - draft_probs).clamp(min=0)
    scores = left * inverse_noise[requests_of(ends, drafts.shape[0])]
    # 1 over a noise of 0 is infinite, and a probability of 0 times that no number.
    output.copy_(scores.masked_fill(left == 0, 0).argmax(dim=-1))


def rejection_greedy_sample(
    output: Tensor,
    ends: Tensor,
    drafts: Tensor,
    best: Tensor,
    bonus: Tensor,
    is_greedy: Tensor | None,
    max_spec_len: int,
    uniform: Tensor | None,
    rates: Tensor | None,
    SYNTHETIC_MODE: bool = False,  # noqa: N803
) -> None:
    """Keep drafted tokens as long as they are the model's most likely ones, for requests that are sampled greedily.

    Args:
        output: `[B, S + 1]`, written where a token was kept, in the place of the first that was not, and after the last if all were.
        ends: `[B]`.
        drafts, best: `[T]`, what was drafted and what the model says.
        bonus: `[B, 1]`, the token after all.
        is_greedy: `[B]`; None: all are.
        max_spec_len: S.
        uniform: `[T]`, of [0, 1), in synthetic mode.
        rates: `[S]`, in synthetic mode: how often a token is kept, whatever the model says.
        SYNTHETIC_MODE: whether it is on.
    """
    at, drafted = _grid(ends, drafts, max_spec_len)
    tokens, found = drafts[at], best[at].to(drafts.dtype)
    if SYNTHETIC_MODE:
        assert uniform is not None
        assert rates is not None
        kept = (uniform[at] < rates[:max_spec_len]) & (tokens >= 0)
        found = torch.where(kept, tokens, found)
    else:
        kept = tokens == found
    _write(output, found, bonus, drafted, kept, is_greedy)


def rejection_random_sample(
    output: Tensor,
    ends: Tensor,
    drafts: Tensor,
    draft_probs: Tensor | None,
    probs: Tensor,
    bonus: Tensor,
    recovered: Tensor,
    uniform: Tensor,
    is_greedy: Tensor,
    max_spec_len: int,
    vocab_size: int,
    rates: Tensor | None,
    NO_DRAFT_PROBS: bool = False,  # noqa: N803
    SYNTHETIC_MODE: bool = False,  # noqa: N803
) -> None:
    """Keep drafted tokens as long as the draw says so, for requests that are sampled at random.

    Args:
        output: `[B, S + 1]`, written as by `rejection_greedy_sample`.
        ends: `[B]`.
        drafts: `[T]`; -1 for one that must not be kept.
        draft_probs: `[T, V]`; None where the draft was certain of its tokens.
        probs: `[T, V]`, the model's.
        bonus: `[B, 1]`, the token after all.
        recovered: `[T]`, what stands in the place of one that is not kept.
        uniform: `[T]`, of [0, 1).
        is_greedy: `[B]`.
        max_spec_len: S.
        vocab_size: V.
        rates: `[S]`, as of `rejection_greedy_sample`.
        NO_DRAFT_PROBS: whether `draft_probs` is None.
        SYNTHETIC_MODE: whether `rates` stand for the distributions.
    """
    at, drafted = _grid(ends, drafts, max_spec_len)
    tokens = drafts[at]
    if SYNTHETIC_MODE:
        assert rates is not None
        kept = uniform[at] < rates[:max_spec_len]
    else:
        named = tokens.clamp(min=0)
        own = probs[at, named]
        if draft_probs is None:
            kept = own >= uniform[at]
        else:
            other = draft_probs[at, named]
            kept = (other > 0) & (own / other >= uniform[at])
    kept = kept & (tokens >= 0)
    _write(output, torch.where(kept, tokens, recovered[at]), bonus, drafted, kept, ~is_greedy)


def _grid(ends: Tensor, drafts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """For each request and place among its drafts which of the T tokens that is, and whether there is one: two of `[B, S]`."""
    place = torch.arange(most, device=ends.device, dtype=ends.dtype)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    at = starts[:, None] + place
    return at.clamp(max=drafts.shape[0] - 1), at < ends[:, None]


def _write(output: Tensor, tokens: Tensor, bonus: Tensor, drafted: Tensor, kept: Tensor, rows: Tensor | None) -> None:
    """Write what has become of the drafts.

    Args:
        output: `[B, S + 1]`.
        tokens: `[B, S]`, what stands in each place, if it is reached.
        bonus: `[B, 1]`, what stands after the last draft of a request of which all are kept.
        drafted: bool `[B, S]`, the places with a draft, the first ones of each row.
        kept: bool `[B, S]`, whether a draft is kept.
        rows: bool `[B]`, the requests to write; None: all.
    """
    # Of the places before and at each one, how many end the row: a draft that is not kept, or none.
    ended = torch.nn.functional.pad((~(drafted & kept)).to(torch.int32).cumsum(dim=1), (1, 0))
    reached = ended == 0  # [B, S + 1]: everything before was drafted and kept
    at_end = torch.nn.functional.pad(~drafted, (0, 1), value=True)
    values = torch.where(at_end, bonus.to(output.dtype), torch.nn.functional.pad(tokens, (0, 1)).to(output.dtype))
    if rows is not None:
        reached = reached & rows[:, None]
    output.copy_(torch.where(reached, values, output))
