# SPDX-License-Identifier: Apache-2.0
"""What memory looks like that nothing has written: 0x7FFF in every two bytes."""

import torch

__all__ = ["is_unwritten"]


def is_unwritten(t: torch.Tensor) -> bool:
    """Whether every byte of a tensor (of a part of one: at whichever byte it begins) is poison."""
    data = t.cpu().contiguous().flatten().view(torch.uint8)
    return bool(((data == 0xFF) | (data == 0x7F)).all())
