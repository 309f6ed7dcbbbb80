# SPDX-License-Identifier: Apache-2.0
"""The communicator of vLLM's groups: torch.distributed over HCCL."""

from __future__ import annotations

from typing import Any

from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["AscendCommunicator"]


class AscendCommunicator(DeviceCommunicatorBase):
    """vLLM's base class, with an all-to-all manager for the expert parallel group: vLLM requires one, though MoE layers here move tokens themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build vLLM's communicator, and the manager where the group is the expert parallel one."""
        super().__init__(*args, **kwargs)
        if self.use_all2all:
            self.all2all_manager = AgRsAll2AllManager(self.cpu_group)  # type: ignore[no-untyped-call]
