# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker process on an NPU: a thin subclass of the GPU worker."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.utils import request_memory
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_ascend import compat, graphs, layers, loader, parallel, states, warmup
from vllm_ascend.attention import kinds, probe
from vllm_ascend.failing import ends_the_engine
from vllm_ascend.layers import mamba
from vllm_ascend.model_runner import AscendModelRunner
from vllm_ascend.profiler import NpuProfiler
from vllm_ascend.quantization import compressed, weight_only
from vllm_ascend.sleep import backend as sleep_backend
from vllm_ascend.sleep.backend import AscendSleepBackend

__all__ = ["AscendWorker"]


class AscendWorker(Worker):
    """One process, one NPU."""

    model_runner: AscendModelRunner

    execute_model = ends_the_engine(Worker.execute_model)
    sample_tokens = ends_the_engine(Worker.sample_tokens)
    execute_dummy_batch = ends_the_engine(Worker.execute_dummy_batch)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Replace vLLM's layers and loader by ours before a model is built."""
        compat.accept_profiler()
        super().__init__(*args, **kwargs)
        layers.register()
        if states.has_states(self.model_config):
            mamba.register()
        loader.register()
        sleep_backend.register()
        compressed.register()
        weight_only.register()

    def init_device(self) -> None:
        """Take the device, join vLLM's process groups and ours, measure free memory."""
        self.device = torch.device("npu", self._device_index())
        torch.npu.set_device(self.device)
        for attention in kinds.of_layers(self.vllm_config):
            probe.check(attention, self.device)
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, current_platform.dist_backend
        )
        parallel.start(self.vllm_config)
        set_random_seed(self.model_config.seed)
        gc.collect()
        torch.npu.empty_cache()
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()

    def _device_index(self) -> int:
        """Index among the visible devices; data parallel replicas on this host take consecutive ones."""
        parallel = self.parallel_config
        assigned = parallel.assigned_physical_gpu_ids
        if assigned is not None:  # `vllm serve` gives this replica its share
            set_assigned_physical_gpu_ids(assigned)
        elif (
            parallel.distributed_executor_backend not in ("ray", "external_launcher") and parallel.nnodes_within_dp == 1
        ):
            replica = parallel.data_parallel_rank_local
            if replica is None:
                replica = parallel.data_parallel_index
            self.local_rank += replica * parallel.world_size
        index = current_platform.logical_device_id_to_visible_device_id(self.local_rank)
        if index >= torch.npu.device_count():
            raise ValueError(
                f"rank {self.rank} needs device {index}, but {torch.npu.device_count()} NPUs are visible; "
                "lower the parallel sizes or widen ASCEND_RT_VISIBLE_DEVICES"
            )
        return int(index)

    def _make_model_runner(self) -> AscendModelRunner:
        assert self.device is not None  # init_device has set it
        runner = AscendModelRunner(self.vllm_config, self.device)
        runner.warm_up = partial(warmup.warm_up, self)
        return runner

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        """Where what is allocated for the model ("weights"), the KV cache ("kv_cache") and beside it ("runtime") lies."""
        if not self.model_config.enable_sleep_mode:
            return nullcontext()
        backend = cast(AscendSleepBackend, self.sleep_mode_backend)
        backend.parameters = lambda: self.model_runner.get_model().parameters()
        return backend.pool(tag)

    def finish_weight_update(self) -> None:
        """Compute with what a trainer has sent. After a failure another update may begin, which vLLM prevents. ValueError as of the transfer's engine."""
        try:
            super().finish_weight_update()
        except BaseException:
            self._weight_update_active = False
            if self.weight_transfer_engine is not None:
                self.weight_transfer_engine.reset_weight_update_target()
            raise

    @ends_the_engine
    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: what vLLM finds, less what graphs will take. Where the user has set the bytes, that."""
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes or not self._captures():
            return int(available)
        largest = self.vllm_config.compilation_config.max_cudagraph_capture_size or 1
        with warmup.small_cache(self.model_runner, largest):
            taken = graphs.measure(self.model_runner)
        self.peak_activation_memory += taken
        self.available_kv_cache_memory_bytes -= taken
        return int(available) - taken

    def _captures(self) -> bool:
        return self.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE

    @ends_the_engine
    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Nothing is compiled. Kernels were warmed up where memory was profiled (`warmup.py`), which vLLM does for a KV cache alone, so those of an encoder
        are now. Graphs are captured."""
        if not self.model_runner.get_kv_cache_spec():
            warmup.warm_up(self, cached=False)
        if self._captures():
            self.model_runner.capture_model()
        set_random_seed(self.model_config.seed)
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def profile(self, is_start: bool = True, profile_prefix: str | None = None, **options: Any) -> None:
        """Start or end a trace, as vLLM does, by torch_npu's profiler."""
        if self.profiler is None and self.profiler_config.profiler == "torch":
            self.profiler = NpuProfiler(self.profiler_config, f"rank{self.rank}")  # vLLM names it before it starts
        super().profile(is_start, profile_prefix, **options)

    def shutdown(self) -> None:
        """Destroy this plugin's groups, then what vLLM built."""
        parallel.close()
        super().shutdown()
        if isinstance(self._sleep_mode_backend, AscendSleepBackend):
            self._sleep_mode_backend.close()
