# SPDX-License-Identifier: Apache-2.0
"""Device memory that can be given back while tensors lie in it, and taken again at the same addresses. No vLLM.

Tensors that are created inside of `SleepingMemory.pool` lie in pools of torch_npu's caching allocator (`torch.npu.MemPool`), whose segments come from here:
reserved addresses, with physical memory mapped to them. To sleep is to copy what is kept to the host and to unmap; tensors, and captured graphs, keep
their addresses.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_ascend.device import let_segments_grow, pluggable_allocator
from vllm_ascend.sleep import cann

__all__ = ["SleepingMemory"]

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def _address_of(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None  # ctypes has made it
    return address


@dataclass(slots=True, kw_only=True)
class _Segment:
    """Addresses of a pool.

    Attributes:
        handle: of the physical memory; None while it sleeps.
        kept: what lay there and comes back: the place in the segment, and the bytes.
        dropped: whether nothing will be mapped here again, for no tensor lies here, and none ever will.
    """

    num_bytes: int
    device: int
    tag: str
    handle: Any
    kept: list[tuple[int, Tensor]] = field(default_factory=list)
    dropped: bool = False


class SleepingMemory:
    """The memory of one engine that can sleep.

    Args:
        segments_grow: whether torch_npu's allocator makes segments that grow. It takes those from CANN itself, so that it must not in a pool.
    """

    _alive: ClassVar[list[SleepingMemory]] = []
    """All there were in this process. torch_npu returns memory through the functions of one long after its engine has ended."""

    def __init__(self, *, segments_grow: bool) -> None:
        """Make the functions by which torch_npu takes and returns memory."""
        self._segments_grow = segments_grow
        self._segments: dict[int, _Segment] = {}
        self._pools: list[tuple[str, Any]] = []
        self._tag = ""
        self._functions = _ALLOCATE(self._allocate), _FREE(self._free)
        self._allocator = pluggable_allocator(*(_address_of(function) for function in self._functions))
        SleepingMemory._alive.append(self)

    @contextmanager
    def pool(self, tag: str) -> Iterator[None]:
        """Let what this thread allocates inside lie in memory that can sleep, under a tag. An inner pool goes before an outer one."""
        before, self._tag = self._tag, tag
        pool = torch.npu.MemPool(self._allocator)
        self._pools.append((tag, pool))
        let_segments_grow(False)
        try:
            with torch.npu.use_mem_pool(pool):
                yield
        finally:
            self._tag = before
            let_segments_grow(self._segments_grow and not before)
            self._drop_unused(pool)

    def sleep(self, discards: Callable[[str, int], bool], tags: tuple[str, ...] | None = None) -> None:
        """Give memory back.

        Args:
            discards: whether the contents of an allocation are not kept, given its tag and address.
            tags: of what sleeps. None: everything.
        """
        torch.npu.synchronize()
        for tag, pool in self._pools:
            if tags is not None and tag not in tags:
                continue
            self._drop_unused(pool)
            for one in pool.snapshot():
                segment = self._segments.get(one["address"])
                if segment is not None and segment.handle is not None:
                    kept = [
                        (block["address"], block["size"])
                        for block in one["blocks"]
                        if block["state"] != "inactive" and not discards(tag, block["address"])
                    ]
                    self._put_to_sleep(one["address"], segment, kept)

    def wake(self, tags: tuple[str, ...] | None = None) -> None:
        """Take memory again, with what was kept. What was discarded has undefined values.

        Args:
            tags: of what wakes. None: everything.

        Raises:
            RuntimeError: the device has not so much left. What has woken before stays awake; the rest wakes when this is called again.
        """
        for address, segment in self._segments.items():
            if segment.handle is not None or segment.dropped or (tags is not None and segment.tag not in tags):
                continue
            try:
                segment.handle = cann.map_memory(address, segment.num_bytes, segment.device)
            except RuntimeError as error:
                free, _ = torch.npu.mem_get_info(segment.device)
                raise RuntimeError(
                    f"cannot wake up: {self.sleeping_bytes(tags)} bytes of NPU {segment.device} are still to be taken, and {free} are free; "
                    f"end what else uses it, and wake up again ({error})"
                ) from error
            for offset, host in segment.kept:
                cann.to_device(address + offset, host.data_ptr(), host.numel())
            segment.kept = []

    def close(self) -> None:
        """End the pools: torch_npu returns their memory when no tensor lies in it and its caches are emptied."""
        self._pools.clear()

    def tags(self) -> set[str]:
        """The tags of what there is."""
        return {segment.tag for segment in self._segments.values()}

    def sleeping_bytes(self, tags: tuple[str, ...] | None = None) -> int:
        """Bytes that sleep, of some tags or of all."""
        return sum(
            segment.num_bytes
            for segment in self._segments.values()
            if segment.handle is None and not segment.dropped and (tags is None or segment.tag in tags)
        )

    def _put_to_sleep(self, address: int, segment: _Segment, kept: list[tuple[int, int]]) -> None:
        for begin, size in kept:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            cann.to_host(host.data_ptr(), begin, size)
            segment.kept.append((begin - address, host))
        cann.unmap(address, segment.handle)
        segment.handle = None

    def _drop_unused(self, pool: Any) -> None:
        """Give back the segments of a pool in which no tensor lies. Nothing is allocated from a pool after its context has ended."""
        for one in pool.snapshot():
            segment = self._segments.get(one["address"])
            if one["allocated_size"] == 0 and segment is not None and segment.handle is not None:
                cann.wait_for_device()
                cann.unmap(one["address"], segment.handle)
                segment.handle, segment.dropped = None, True

    def _allocate(self, num_bytes: int, device: int, stream: int | None) -> int | None:
        """What torch_npu calls for a segment. None where there is no memory, of which it makes its error."""
        num_bytes = -(-num_bytes // cann.PAGE) * cann.PAGE
        try:
            address = cann.reserve(num_bytes)
        except RuntimeError:
            return None
        try:
            handle = cann.map_memory(address, num_bytes, device)
        except RuntimeError:
            cann.release(address)
            return None
        self._segments[address] = _Segment(num_bytes=num_bytes, device=device, tag=self._tag, handle=handle)
        return address

    def _free(self, address: int, num_bytes: int, stream: int | None) -> None:
        """What torch_npu calls when it returns a segment."""
        segment = self._segments.pop(address)
        try:
            if segment.handle is not None:
                cann.wait_for_device()
                cann.unmap(address, segment.handle)
            cann.release(address)
        except RuntimeError as error:  # no exception passes through torch_npu
            print(f"vllm-ascend: memory of the device could not be given back: {error}", file=sys.stderr)
