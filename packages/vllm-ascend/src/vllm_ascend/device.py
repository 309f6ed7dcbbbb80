# SPDX-License-Identifier: Apache-2.0
"""What vllm-ascend asks of torch_npu besides kernels: its allocator and its profiler."""

from __future__ import annotations

from typing import Any

import torch

from vllm_ascend.kernels import npu

__all__ = ["device_profiler", "let_segments_grow", "pluggable_allocator"]


def pluggable_allocator(allocate: int, free: int) -> Any:
    """An allocator for `torch.npu.MemPool`, as `torch.npu.memory.NPUPluggableAllocator` makes it of two functions of a library.

    Args:
        allocate: address of `void *(ssize_t bytes, int device, aclrtStream stream)`.
        free: address of `void (void *pointer, size_t bytes, aclrtStream stream)`.
    """
    return npu()._C._npu_customAllocator(allocate, free)


def device_profiler(
    *, folder: str, name: str, steps: tuple[int, int, int] | None, device: bool, **options: bool
) -> Any:
    """A profiler of the host, and of the device, which writes its traces when it stops.

    Args:
        folder: where each trace gets a folder.
        name: how that folder's name begins.
        steps: how many steps it waits, warms up and records. None: it records from its start to its end.
        device: whether the device is recorded.
        options: `record_shapes`, `profile_memory`, `with_stack`, `with_flops`.
    """
    profiler = npu().profiler
    schedule = None if steps is None else profiler.schedule(wait=steps[0], warmup=steps[1], active=steps[2], repeat=1)
    return profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, *([profiler.ProfilerActivity.NPU] if device else [])],
        schedule=schedule,
        on_trace_ready=profiler.tensorboard_trace_handler(folder, worker_name=name),
        **options,
    )


def let_segments_grow(grow: bool) -> None:
    """Whether torch_npu's allocator makes segments that grow from now on (`expandable_segments`, the one setting that it changes in a process that runs)."""
    torch.npu.memory._set_allocator_settings(f"expandable_segments:{grow}")  # type: ignore[attr-defined]
