# SPDX-License-Identifier: Apache-2.0
"""How many tokens each expert slot received, and the two forms of a grouped matmul's `group_list`.

Legend: T tokens, K experts per token, S physical slots.
"""

import torch
from torch import Tensor

__all__ = ["counts_to_cumsum", "cumsum_to_counts", "slot_load"]


def slot_load(ids: Tensor, num_slots: int, mask: Tensor | None = None) -> Tensor:
    """Count the tokens of every physical slot. The shape does not depend on values, so the host does not wait for the device.

    Args:
        ids: int32 or int64 `[T, K]`, the slots of each token, in 0..num_slots-1 for tokens that count.
        num_slots: physical slots of all ranks. Those of rank r, with L each, are `[r * L : (r + 1) * L]` of the result.
        mask: bool `[T]`, True for real tokens. Padding does not count, whatever its ids are. None: all are real.

    Returns:
        int64 `[S]`; its sum is real tokens times K.

    Raises:
        ValueError: a wrong shape, dtype or device, or `num_slots` < 1.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots={num_slots} must be at least 1")
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids of {ids.dtype} {list(ids.shape)} must be torch.int32 or torch.int64 [tokens, top_k]")
    ids_TK = ids.long()
    ones_TK = torch.ones_like(ids_TK)
    if mask is not None:
        if mask.shape != ids.shape[:1] or mask.dtype != torch.bool or mask.device != ids.device:
            given = f"{mask.dtype} {list(mask.shape)} on {mask.device}"
            raise ValueError(f"mask of {given} must be torch.bool [{ids.shape[0]}] on {ids.device}")
        real_T1 = mask.unsqueeze(1)
        ids_TK = torch.where(real_T1, ids_TK, 0)
        ones_TK = ones_TK * real_T1
    load_S = torch.zeros(num_slots, dtype=torch.int64, device=ids.device)
    return load_S.index_add(0, ids_TK.flatten(), ones_TK.flatten())


def counts_to_cumsum(counts: Tensor) -> Tensor:
    """A `group_list` of type 1 (rows of each group) converted to type 0 (the row after the last one of each group).

    The vLLM plugin does not use this function, nor `cumsum_to_counts`: kernels are called with type 1.

    Args:
        counts: int32 or int64 `[S]`.

    Returns:
        int64 `[S]`; its last entry is the number of rows.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    _check_group_list("counts", counts)
    return counts.cumsum(0, dtype=torch.int64)


def cumsum_to_counts(cumsum: Tensor) -> Tensor:
    """The inverse of `counts_to_cumsum`.

    Args:
        cumsum: int32 or int64 `[S]`, in ascending order; equal entries are allowed.

    Returns:
        int64 `[S]`.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    _check_group_list("cumsum", cumsum)
    ends = cumsum.long()
    return ends.diff(prepend=ends.new_zeros(1))


def _check_group_list(name: str, given: Tensor) -> None:
    if given.dim() != 1 or given.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} of {given.dtype} {list(given.shape)} must be torch.int32 or torch.int64 [slots]")
