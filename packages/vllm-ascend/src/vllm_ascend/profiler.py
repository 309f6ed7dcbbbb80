# SPDX-License-Identifier: Apache-2.0
"""`--profiler-config` on an NPU: vLLM's profiler of a worker, over that of torch_npu."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.profiler.wrapper import WorkerProfiler

from vllm_ascend.device import device_profiler

__all__ = ["NpuProfiler"]


class NpuProfiler(WorkerProfiler):
    """Traces of one worker, in a folder of its own below `torch_profiler_dir`, in the form that MindStudio and `torch_npu.profiler` read.

    The device is recorded beside the host unless `torch_profiler_activities` names the host alone ("CPU").

    Args:
        config: vLLM's `ProfilerConfig`.
        name: how the folder's name begins.
    """

    def __init__(self, config: Any, name: str) -> None:
        """Store the arguments."""
        super().__init__(config)
        self._config, self._name = config, name
        self._profiler: Any = None
        self._warmups_left = 0

    def set_output_name(self, worker_name: str) -> None:
        """How the name of the folder of the next trace begins."""
        if not self._active:
            self._name = worker_name

    def _start(self) -> None:
        config = self._config
        scheduled = config.warmup_iterations > 0 or config.wait_iterations > 0
        steps = (config.wait_iterations, config.warmup_iterations, config.active_iterations) if scheduled else None
        self._profiler = device_profiler(
            folder=config.torch_profiler_dir,
            name=self._name,
            steps=steps,
            device=config.torch_profiler_activities is None,
            record_shapes=config.torch_profiler_record_shapes,
            profile_memory=config.torch_profiler_with_memory,
            with_stack=config.torch_profiler_with_stack,
            with_flops=config.torch_profiler_with_flops,
        )
        # The first step begins with the profiler.
        self._warmups_left = max(config.wait_iterations + config.warmup_iterations - 1, 0)
        self._profiler.start()

    def _stop(self) -> None:
        self._profiler.stop()
        self._profiler = None

    def _profiler_step(self) -> bool:
        self._profiler.step()
        if self._warmups_left:
            self._warmups_left -= 1
            return False
        return True

    def annotate_context_manager(self, name: str) -> AbstractContextManager[Any]:
        """A range of the trace with a name."""
        return torch.profiler.record_function(name) if self.should_annotate else nullcontext()
