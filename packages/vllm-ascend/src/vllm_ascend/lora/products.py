# SPDX-License-Identifier: Apache-2.0
"""The two products of LoRA, `y += (x @ A.T) @ B.T`, of rows that each have an adapter of their own, or none. No vLLM.

All adapters are multiplied with all rows, and what is another adapter's is set to zero between the two products: L times the operations, and still few, for
a rank is small. The other ways gather a pair of matrices for each row, or sort the rows by their adapters. This one launches the same operators whatever
adapters the rows have, so that the host need not know; and a row of the base model gets exactly 0.

Legend: N rows, L adapters, r rank, I input features, O output features. `A [L, 1, r, I]` and `B [L, 1, O, r]` are vLLM's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["add_expanded", "lay_out", "own", "shrink", "spread"]


def lay_out(b: Tensor) -> Tensor:
    """`B` with the same values, such that those of one output feature lie side by side in memory, as `add_expanded` reads them."""
    rows_first = b.new_empty((b.shape[2], b.shape[0], b.shape[3]))
    laid_out = rows_first.permute(1, 0, 2).unsqueeze(1)
    return laid_out.copy_(b)


def shrink(x: Tensor, a: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
    """The product with A of each row's own adapter.

    Args:
        x: `[N, I]`.
        a: `[L, 1, r, I]`.
        mask: bool `[N, L]`, True where a row has an adapter.
        scale: a factor.

    Returns:
        `[N, L, r]`, zeros for the adapters that are not a row's own.
    """
    shrunk = functional.linear(x.to(a.dtype), a.flatten(0, 2)).view(len(x), a.shape[0], a.shape[2])
    # A product with zero would let what is not finite in one adapter's rows pass into those of others.
    masked = torch.where(mask.unsqueeze(-1), shrunk, torch.zeros((), dtype=shrunk.dtype, device=shrunk.device))
    return masked if scale == 1.0 else masked * scale


def own(shrunk: Tensor) -> Tensor:
    """`[N, L, r]`, of which one adapter's values are not zero -> `[N, r]`, those values."""
    return shrunk.sum(1)


def spread(rows: Tensor, mask: Tensor) -> Tensor:
    """The opposite of `own`: `[N, r]` and the mask `[N, L]` -> `[N, L, r]`."""
    return rows.unsqueeze(1) * mask.unsqueeze(-1)


def add_expanded(y: Tensor, shrunk: Tensor, b: Tensor) -> None:
    """Add the product with B of each row's own adapter.

    Args:
        y: `[N, O]`, which is changed.
        shrunk: `[N, L, r]`, as of `shrink`.
        b: `[L, 1, O, r]`, finite; without a copy where it comes from `lay_out`.
    """
    weight = b.squeeze(1).permute(1, 0, 2).reshape(b.shape[2], -1)
    shrunk = shrunk.flatten(1).to(b.dtype)
    if y.dtype == b.dtype:
        y.addmm_(shrunk, weight.t())
    else:
        y.add_(functional.linear(shrunk, weight))
