# SPDX-License-Identifier: Apache-2.0
"""What vLLM's groups communicate with: torch.distributed over HCCL."""

from __future__ import annotations

from typing import Any

from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["AscendCommunicator"]


class AscendCommunicator(DeviceCommunicatorBase):
    """vLLM's base class. Its expert parallel group has a manager, which vLLM wants to see: MoE layers here move tokens themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's."""
        super().__init__(*args, **kwargs)
        if self.use_all2all:
            self.all2all_manager = AgRsAll2AllManager(self.cpu_group)  # type: ignore[no-untyped-call]
