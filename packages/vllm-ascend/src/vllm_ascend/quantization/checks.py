# SPDX-License-Identifier: Apache-2.0
"""What must hold of the tensors of a quantised layer once they are loaded. vLLM does not look whether all have been, in a quantised checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_loaded", "check_symmetric"]


def check_loaded(layer: str, **tensors: Tensor) -> None:
    """Raise ValueError if one of `tensors`, which were created as NaN, has not been overwritten."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"layer {layer!r}: {name} is not in the checkpoint's files, or not finite")


def check_symmetric(layer: str, offset: Tensor) -> None:
    """Raise ValueError for a weight with an offset."""
    if bool(offset.any()):
        raise ValueError(
            f"layer {layer!r}: weight_offset has values other than 0; asymmetric weights are not supported"
        )
