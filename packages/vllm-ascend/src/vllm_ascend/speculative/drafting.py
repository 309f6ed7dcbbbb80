# SPDX-License-Identifier: Apache-2.0
"""The inputs of a draft by operators of torch: what vLLM's Triton kernels of `v1/spec_decode/utils.py` compute, with their arguments.

B requests have sent T tokens through the model, of which the last ones of each may have been rejected. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ascend.speculative.rejection import requests_of

__all__ = ["copy_and_expand_inputs", "prepare_inputs_padded", "prepare_next_token_padded", "step_slot_mapping"]


def prepare_inputs_padded(
    draft_ends: Tensor, counts: Tensor, query_start_loc: Tensor, last: Tensor, rejected: Tensor, num_reqs: int
) -> None:
    """How many drafted tokens of each request were rejected, and which of the T tokens is its last that was not.

    Args:
        draft_ends: `[B]`, cumulative drafted tokens.
        counts: `[B]`, tokens that each request has won: those that were kept and one more; 0 for one that is not sampled.
        query_start_loc: `[B + 1]`, first token of each request.
        last, rejected: `[B]`, written.
        num_reqs: B.
    """
    drafted = torch.diff(draft_ends, prepend=draft_ends.new_zeros(1))
    rejected.copy_(torch.where(drafted > 0, drafted + 1 - counts, 0))
    last.copy_(query_start_loc[1 : num_reqs + 1] - 1 - rejected)


def prepare_next_token_padded(
    sampled: Tensor,
    discarded: Tensor,
    backup: Tensor,
    following: Tensor,
    counts: Tensor,
    vocab_size: int,
    width: int,
    num_reqs: int,
    *strides: int,
) -> None:
    """How many tokens each request has won, and the last of them.

    Args:
        sampled: `[B, width]`, -1 after the last.
        discarded: bool, `[B]` or longer: requests that are not sampled yet.
        backup: `[B]` or longer: the next token of those.
        following, counts: `[B]`, written.
        vocab_size: larger numbers are no tokens.
        width: of `sampled`.
        num_reqs: B.
        strides: unused, of `sampled`, and the Triton kernel's tile.
    """
    won = (sampled != -1) & (sampled < vocab_size) & ~discarded[:num_reqs, None]
    counts.copy_(won.sum(dim=1))
    place = torch.arange(width, device=sampled.device)
    last = torch.where(won, place, 0).amax(dim=1)
    token = sampled.gather(1, last[:, None]).squeeze(1)
    following.copy_(torch.where(counts > 0, token, backup[:num_reqs]))


def step_slot_mapping(
    positions: Tensor,
    block_table: Tensor,
    block_table_stride: int,
    seq_lens: Tensor,
    next_positions: Tensor,
    slot_mapping: Tensor,
    block_size: int,
    max_model_len: int,
    n_blocks_per_req: int,
    PAD_ID: int,  # noqa: N803  (the kernel's name)
    batch_size: int,
) -> None:
    """Move each request one token on.

    Args:
        positions: `[B]`.
        block_table: `[B, blocks]`.
        block_table_stride: unused; a row may be part of a longer one.
        seq_lens: `[B]`, one more afterwards, and 1 for a request that has no room for it.
        next_positions: `[B]`, written: one more, and 0 for such a request.
        slot_mapping: `[B]` or longer, written: the slot of each of these positions; `PAD_ID` for such a request and after the last one.
        block_size: tokens of a block.
        max_model_len: the room of a request.
        n_blocks_per_req: blocks of a row.
        PAD_ID: the slot that means "none".
        batch_size: B.
    """
    moved = positions + 1
    full = moved >= max_model_len
    moved = torch.where(full, 0, moved)
    block = (moved // block_size).clamp(max=n_blocks_per_req - 1)
    slots = block_table[:batch_size].gather(1, block[:, None]).squeeze(1) * block_size + moved % block_size
    next_positions.copy_(moved)
    slot_mapping[:batch_size].copy_(torch.where(full, PAD_ID, slots))
    slot_mapping[batch_size:].fill_(PAD_ID)
    seq_lens.copy_(torch.where(full, 1, seq_lens + 1).clamp(max=max_model_len))


def copy_and_expand_inputs(
    tokens: Tensor,
    positions: Tensor,
    following: Tensor,
    out_tokens: Tensor,
    out_positions: Tensor,
    out_rejected: Tensor,
    out_masked: Tensor,
    out_new: Tensor,
    out_hidden: Tensor,
    query_start_loc: Tensor,
    last: Tensor,
    padding_token: int,
    mask_token: int,
    total: int,
    slots: int,
    shifted: bool,
    *tiles: int,
) -> None:
    """The inputs of a draft that takes the request's last token beside those that the model took.

    Of each request: its tokens that were not rejected, the token that follows them, `slots - 1` mask tokens (for drafts that say several tokens at once), and as many
    padding tokens as were rejected. vLLM's kernel marks the padding, so that its keys are written nowhere. Here it has the positions that come next, and so the slots that come next: the
    kernel that writes the cache takes no slot that means "none", and what is written there is written again before a token sees it.

    Args:
        tokens, positions: `[T]`, of the model's step.
        following: `[B]`, the token that follows.
        out_tokens, out_positions: written, `T + B * n` of them, n being `slots`, or one less where `shifted`.
        out_rejected, out_masked: bool, written: False; whether it is a mask token.
        out_new: `[B * slots]`, written: where the following token and the mask tokens of each request are.
        out_hidden: `[T]`, written where `shifted`: where the hidden state of each of the model's tokens goes.
        query_start_loc: `[B + 1]`, first token of each request.
        last: `[B]`, the last token of each that was not rejected.
        padding_token, mask_token: their numbers.
        total: T.
        slots: new tokens of each request.
        shifted: whether the first token of each is left out.
        tiles: unused, the Triton kernel's.
    """
    requests = following.shape[0]
    grown = slots - shifted
    arange = torch.arange(total + requests * grown, device=tokens.device, dtype=query_start_loc.dtype)
    shift = grown * arange[: requests + 1]
    starts = query_start_loc[: requests + 1] + shift
    request = requests_of(starts[1:], len(arange))
    place = arange - starts[request]  # of each output token within its request
    kept = (last - query_start_loc[:requests] + (1 - shifted))[request]  # tokens of the model's that come first
    source = (query_start_loc[request] + place + int(shifted)).clamp(max=total - 1)
    is_new = (place >= kept) & (place < kept + slots)
    is_mask = is_new & (place > kept)
    found = torch.where(place < kept, tokens[source], padding_token)
    found = torch.where(place == kept, following[request], found)
    out_tokens[: len(arange)].copy_(torch.where(is_mask, mask_token, found))
    out_positions[: len(arange)].copy_(positions[query_start_loc[request]] + place)
    out_rejected[: len(arange)].fill_(False)
    out_masked[: len(arange)].copy_(is_mask)
    new = torch.arange(slots, device=tokens.device, dtype=starts.dtype)
    first = starts[:-1] + last - query_start_loc[:requests] + (1 - shifted)
    out_new.copy_((first[:, None] + new).flatten())
    if shifted:
        mine = requests_of(query_start_loc[1 : requests + 1], total)
        out_hidden.copy_(arange[:total] + shift[mine])
