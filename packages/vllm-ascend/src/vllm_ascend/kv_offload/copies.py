# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks between an NPU's KV cache and pinned host memory, on streams of their own. The host waits for none of them in a step.

What orders them:

* A store begins after what the step's stream has been given so far, which computed the blocks; a load as well, for a block's earlier use may still be on its way.
* Stores come one after the other, and so do loads. A chunk in host memory is read only after its store was reported as finished, and is given to another
  block only after its loads were: vLLM's manager counts them.
* Where a block is used anew before its store is complete, the step's stream waits for the store (`wait`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

__all__ = ["AscendOffloadingWorker", "Run", "runs"]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks on the device, from `device` on, and as many consecutive ones in host memory, from `host` on."""

    device: int
    host: int
    length: int


def runs(
    gpu: GPULoadStoreSpec, chunks: NDArray[np.int32], blocks_per_chunk: int
) -> Iterator[tuple[int, Run]]:  # fmt: skip
    """The blocks of a transfer, in as few pieces as their numbers allow; each with the number of its group of layers.

    Args:
        gpu: blocks on the device, group after group, with the place of each group's first block in its request.
        chunks: in host memory, in the same order. A group's first block need not be the first of its chunk.
        blocks_per_chunk: blocks that one chunk holds.
    """
    of_device = of_host = 0
    for group, (size, place) in enumerate(zip(gpu.group_sizes, gpu.block_indices, strict=True)):
        if not size:
            continue
        skipped = place % blocks_per_chunk
        taken = -(-(skipped + size) // blocks_per_chunk)
        device = gpu.block_ids[of_device : of_device + size].astype(np.int64)
        whole = chunks[of_host : of_host + taken, None].astype(np.int64) * blocks_per_chunk
        host = (whole + np.arange(blocks_per_chunk)).ravel()[skipped : skipped + size]
        of_device, of_host = of_device + size, of_host + taken
        breaks = np.flatnonzero((np.diff(device) != 1) | (np.diff(host) != 1)) + 1
        for begin, end in zip([0, *breaks], [*breaks, size], strict=True):
            yield group, Run(int(device[begin]), int(host[begin]), int(end - begin))


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One that was begun."""

    job: int
    num_bytes: int
    begun: Any  # torch.npu.Event
    ended: Any


class _Direction:
    """Transfers of one direction, one after the other.

    Args:
        device: the cache's memory, int8 `[blocks, bytes]` each.
        host: for each of these the memory of its blocks, int8 `[blocks, bytes]`.
        groups: which of the tensors have the blocks of each group of layers.
        stores: from the device to the host.
    """

    def __init__(
        self,
        device: Sequence[Tensor],
        host: Sequence[Tensor],
        groups: Sequence[Sequence[CanonicalKVCacheRef]],
        *,
        stores: bool,
    ) -> None:
        """Open the stream."""
        self._device, self._host, self._groups, self._stores = device, host, groups, stores
        self._stream = torch.npu.Stream()
        self._begun: deque[_Transfer] = deque()

    def begin(self, job: int, pieces: Iterator[tuple[int, Run]]) -> None:
        """Queue the copies of a job, after all that the current stream has been given."""
        begun, ended = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
        self._stream.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(self._stream):
            begun.record()
            num_bytes = sum(self._copy(group, run) for group, run in pieces)
            ended.record()
        self._begun.append(_Transfer(job, num_bytes, begun, ended))

    def _copy(self, group: int, run: Run) -> int:
        num_bytes = 0
        for reference in self._groups[group]:
            device = self._device[reference.tensor_idx][run.device : run.device + run.length]
            host = self._host[reference.tensor_idx][run.host : run.host + run.length]
            source, target = (device, host) if self._stores else (host, device)
            target.copy_(source, non_blocking=True)
            num_bytes += source.numel()
        return num_bytes

    def finished(self) -> Iterator[TransferResult]:
        """Those that have ended since the last call."""
        while self._begun and self._begun[0].ended.query():
            one = self._begun.popleft()
            seconds = float(one.begun.elapsed_time(one.ended)) / 1e3
            yield TransferResult(one.job, success=True, transfer_size=one.num_bytes, transfer_time=seconds)

    def hold_up(self, jobs: set[int]) -> None:
        """Let the current stream wait for jobs."""
        for one in self._begun:
            if one.job in jobs:
                torch.npu.current_stream().wait_event(one.ended)

    def close(self) -> None:
        """Wait for all that was begun."""
        self._stream.synchronize()
        self._begun.clear()


class AscendOffloadingWorker(OffloadingWorker):
    """One worker's copies.

    Args:
        kv_caches: its cache.
        num_chunks: chunks of host memory.
        blocks_per_chunk: blocks of the cache in each.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, *, num_chunks: int, blocks_per_chunk: int) -> None:
        """Take the host's memory.

        Raises:
            RuntimeError: there is not as much.
        """
        self._blocks_per_chunk = blocks_per_chunk
        device = [one.tensor for one in kv_caches.tensors]
        blocks = num_chunks * blocks_per_chunk
        try:
            host = [torch.empty((blocks, one.shape[1]), dtype=torch.int8, pin_memory=True) for one in device]
        except RuntimeError as error:
            wanted = blocks * sum(one.shape[1] for one in device)
            raise RuntimeError(
                f"{wanted} bytes of host memory for the KV cache of one rank could not be pinned: {error}; give a smaller kv_offloading_size "
                "(cpu_bytes_to_use of kv_connector_extra_config)"
            ) from error
        groups = kv_caches.group_data_refs
        self._storing = _Direction(device, host, groups, stores=True)
        self._loading = _Direction(device, host, groups, stores=False)

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Begin to copy blocks to the host. Always accepted."""
        assert isinstance(dst_spec, BlockIDsLoadStoreSpec)
        self._storing.begin(job_id, runs(src_spec, dst_spec.block_ids, self._blocks_per_chunk))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Begin to copy blocks back. Always accepted."""
        assert isinstance(src_spec, BlockIDsLoadStoreSpec)
        self._loading.begin(job_id, runs(dst_spec, src_spec.block_ids, self._blocks_per_chunk))
        return True

    def get_finished(self) -> list[TransferResult]:
        """What has ended since the last call, with its bytes and seconds."""
        return [*self._storing.finished(), *self._loading.finished()]

    def wait(self, job_ids: set[int]) -> None:
        """Let what the current stream is given from now on come after these jobs. vLLM asks for it before blocks that they read or write are used anew;
        the host goes on."""
        self._storing.hold_up(job_ids)
        self._loading.hold_up(job_ids)

    def shutdown(self) -> None:
        """Wait for all copies; the memory goes with this object."""
        self._storing.close()
        self._loading.close()
