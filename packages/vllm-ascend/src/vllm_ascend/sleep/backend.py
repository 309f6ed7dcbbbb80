# SPDX-License-Identifier: Apache-2.0
"""vLLM's interface for sleep mode, over `pool.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from vllm.device_allocator import DEFERRABLE_TAGS
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory

from vllm_ascend import envs
from vllm_ascend.sleep.limits import BACKEND
from vllm_ascend.sleep.pool import SleepingMemory

__all__ = ["AscendSleepBackend", "register"]


class AscendSleepBackend(SleepModeBackend):
    """Level 1 keeps everything but the KV cache in host memory. Level 2 keeps neither the KV cache nor the model's parameters, which are loaded anew after it;
    what a layer holds beside its parameters is kept."""

    parameters: Callable[[], Iterable[Tensor]]
    """The model's parameters. The worker sets it."""

    def __init__(self) -> None:
        """No memory yet."""
        super().__init__()
        self._memory = SleepingMemory(segments_grow=envs.segments_grow())

    def pool(self, tag: str) -> AbstractContextManager[None]:
        """Where what is allocated can sleep."""
        return self._memory.pool(tag)

    def suspend(self, level: int = 1) -> None:
        """Give device memory back.

        Args:
            level: 1 or 2.

        Raises:
            ValueError: another level.
        """
        if level not in (1, 2):
            raise ValueError(f"sleep level ({level}) must be 1 (weights in host memory) or 2 (weights discarded)")
        parameters = {one.untyped_storage().data_ptr() for one in self.parameters()} if level == 2 else set()
        self._memory.sleep(lambda tag, address: tag == "kv_cache" or (tag == "weights" and address in parameters))
        self._state = "SUSPENDED"
        torch.npu.empty_cache()

    def resume(self, tags: list[str] | None = None) -> None:
        """Take device memory again.

        Args:
            tags: "weights", "kv_cache" or both, of which what is not named sleeps on. None: all.

        Raises:
            ValueError: another tag.
            RuntimeError: as of `SleepingMemory.wake`.
        """
        if tags is not None and (unknown := sorted(set(tags) - set(DEFERRABLE_TAGS))):
            raise ValueError(f"wake-up tags {unknown} must be of {', '.join(DEFERRABLE_TAGS)}")
        torch.npu.empty_cache()
        kept_asleep = set() if tags is None else set(DEFERRABLE_TAGS) - set(tags)
        self._memory.wake(tuple(self._memory.tags() - kept_asleep))
        self._state = "SUSPENDED" if self._memory.sleeping_bytes() else "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        """Give memory of some tags back without keeping what is in it."""
        self._memory.sleep(lambda tag, address: True, tags)
        self._state = "SUSPENDED"
        torch.npu.empty_cache()

    def close(self) -> None:
        """Let memory go with the tensors in it. Nothing sleeps or wakes after that."""
        self._memory.close()

    @classmethod
    def preserves_communicators(cls) -> bool:
        """Groups of HCCL are not touched."""
        return True

    @classmethod
    def preserves_graphs_with_communicators(cls) -> bool:
        """Addresses stay as they are, and so do groups."""
        return True


def register() -> None:
    """Put the backend into vLLM's registry, where it is not there yet."""
    if BACKEND not in SleepModeBackendFactory._registry:
        SleepModeBackendFactory.register_backend(BACKEND, __name__, AscendSleepBackend.__name__)
