# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution before a recurrence, which continues from the last inputs that it has seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["causal_convolution"]


def causal_convolution(inputs: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each channel over the last W inputs, then SiLU. In float32; a product and a sum for each of the W taps, of which models have four.

    Args:
        inputs: `[R, T, D]`, T new tokens of each of R requests.
        window: `[R, W - 1, D]`, the inputs before them; zero for a request that begins.
        weight: `[D, W]`.
        bias: `[D]`.

    Returns:
        Outputs `[R, T, D]` in the type of the inputs, and the window after the last token `[R, W - 1, D]` in its own type.
    """
    tokens = inputs.shape[1]
    seen = torch.cat([window, inputs.to(window.dtype)], dim=1)
    taps = weight.float().t()
    summed = sum((seen[:, tap : tap + tokens].float() * taps[tap] for tap in range(len(taps))), taps.new_zeros(()))
    if bias is not None:
        summed = summed + bias.float()
    return functional.silu(summed).to(inputs.dtype), seen[:, tokens:]
