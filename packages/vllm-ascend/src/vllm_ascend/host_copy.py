# SPDX-License-Identifier: Apache-2.0
"""Copies from the device for which only who needs them waits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """A tensor on its way to the host, without a wait.

    Args:
        values: on the device.
    """

    def __init__(self, values: Tensor) -> None:
        """Begin the copy."""
        self._values = values  # kept until it is copied
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._copied = torch.npu.Event()
        self._copied.record()

    def is_there(self) -> bool:
        """Whether the copy is complete."""
        return bool(self._copied.query())

    def result(self) -> Tensor:
        """The copy, which any thread may wait for."""
        torch.npu.set_device(self._values.device)  # of the thread
        self._copied.synchronize()
        return self._host
