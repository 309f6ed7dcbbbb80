# SPDX-License-Identifier: Apache-2.0
"""What vLLM's OffloadingConnector asks for: vLLM's bookkeeping of chunks in host memory, and an NPU's copies."""

from __future__ import annotations

from vllm.v1.kv_offload.base import CanonicalKVCaches
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from vllm_ascend.kv_offload.copies import AscendOffloadingWorker

__all__ = ["AscendOffloadingSpec"]


class AscendOffloadingSpec(CPUOffloadingSpec):
    """vLLM's offloading to host memory, with its policies (LRU, ARC), metrics and options."""

    def __init__(self, config: OffloadingConfig) -> None:
        """Count the chunks that fit.

        Raises:
            ValueError: not one does.
        """
        super().__init__(config)
        if self.kv_bytes_per_chunk and not self.num_chunks:
            raise ValueError(
                f"{self.extra_config['cpu_bytes_to_use']} bytes of host memory (kv_offloading_size, or cpu_bytes_to_use of kv_connector_extra_config) hold no "
                f"chunk of the KV cache, of {self.kv_bytes_per_chunk} bytes: give at least as many, or fewer blocks_per_chunk"
            )

    def get_worker(self, kv_caches: CanonicalKVCaches) -> AscendOffloadingWorker:
        """The copies of one worker."""
        return AscendOffloadingWorker(
            kv_caches, num_chunks=self.num_chunks, blocks_per_chunk=self.config.cache.blocks_per_chunk
        )
