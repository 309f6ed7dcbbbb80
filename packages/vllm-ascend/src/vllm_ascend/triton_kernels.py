# SPDX-License-Identifier: Apache-2.0
"""What stands in the place of vLLM's Triton kernels on the paths of its V1 model runner."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_ascend.speculative import drafting, rejection

__all__ = ["REPLACEMENTS", "compute_slot_mapping"]


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    slot_mapping: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,  # noqa: N803  (the names are the kernel's)
    TOTAL_CP_WORLD_SIZE: int = 1,  # noqa: N803
    TOTAL_CP_RANK: int = 0,  # noqa: N803
    CP_KV_CACHE_INTERLEAVE_SIZE: int = 1,  # noqa: N803
    PAD_ID: int = -1,  # noqa: N803
    BLOCK_SIZE: int = 1024,  # noqa: N803
) -> None:
    """Slot of each token: block * block_size + offset within it; `PAD_ID` after the last token and for another rank's tokens.

    Args:
        num_tokens: tokens of this step.
        max_num_tokens: length of `slot_mapping`.
        query_start_loc: `[requests + 1]`, first token of each request.
        positions: `[num_tokens]`, position of each token in its request.
        block_table: `[requests, stride]`, physical block of each logical one.
        block_table_stride: blocks of a row.
        slot_mapping: `[max_num_tokens]`, written.
        KV_CACHE_BLOCK_SIZE: tokens of a block.
        TOTAL_CP_WORLD_SIZE: ranks over which a request's tokens are spread (context parallel).
        TOTAL_CP_RANK: this rank among them.
        CP_KV_CACHE_INTERLEAVE_SIZE: consecutive tokens on one rank.
        PAD_ID: the slot that means "none".
        BLOCK_SIZE: unused, the Triton kernel's tile.
    """
    position = positions[:num_tokens]
    request = rejection.requests_of(query_start_loc[1:], num_tokens)
    span = KV_CACHE_BLOCK_SIZE * TOTAL_CP_WORLD_SIZE
    block = block_table.reshape(-1)[request * block_table_stride + position // span]
    offset = position % span
    if TOTAL_CP_WORLD_SIZE > 1:
        run = CP_KV_CACHE_INTERLEAVE_SIZE
        local = offset // run % TOTAL_CP_WORLD_SIZE == TOTAL_CP_RANK
        offset = offset // (TOTAL_CP_WORLD_SIZE * run) * run + offset % run
        slot_mapping[:num_tokens] = torch.where(local, block * KV_CACHE_BLOCK_SIZE + offset, PAD_ID)
    else:
        slot_mapping[:num_tokens] = block * KV_CACHE_BLOCK_SIZE + offset
    slot_mapping[num_tokens:max_num_tokens].fill_(PAD_ID)


_REJECTION, _DRAFTS = "vllm.v1.sample.rejection_sampler", "vllm.v1.spec_decode.utils"

REPLACEMENTS: dict[str, Callable[..., None]] = {
    "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping,
    f"{_REJECTION}.expand_kernel": rejection.expand,
    f"{_REJECTION}.rejection_greedy_sample_kernel": rejection.rejection_greedy_sample,
    f"{_REJECTION}.rejection_random_sample_kernel": rejection.rejection_random_sample,
    f"{_REJECTION}.sample_recovered_tokens_kernel": rejection.sample_recovered_tokens,
    f"{_DRAFTS}.copy_and_expand_eagle_inputs_kernel": drafting.copy_and_expand_inputs,
    f"{_DRAFTS}.eagle_prepare_inputs_padded_kernel": drafting.prepare_inputs_padded,
    f"{_DRAFTS}.eagle_prepare_next_token_padded_kernel": drafting.prepare_next_token_padded,
    f"{_DRAFTS}.eagle_step_slot_mapping_metadata_kernel": drafting.step_slot_mapping,
}
"""By the full name of a kernel a function with its arguments, in its order."""
