# SPDX-License-Identifier: Apache-2.0
"""A trainer and the workers of an engine in one group of HCCL, beside the groups that either side has. No vLLM.

A broadcast that one side has not entered would never end. So before each one all sides meet at a store of the trainer, where whoever fails leaves a
message for the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from vllm_ascend import envs

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName

__all__ = ["TransferGroup"]

_POLL_SECONDS = 0.002
# Keys of the store: what the first member that failed says, the name of HCCL's group, how often workers have waited and the trainer has sent.
_FAILED, _NAME, _WAITING, _SENT = "failed", "name", "waiting", "sent"


class TransferGroup:
    """The members of a transfer: rank 0, which sends, and all others, which receive.

    Args:
        host: the trainer's address.
        port: where the trainer's store listens. 0, on rank 0: any that is free.
        rank: of this process.
        size: of the group.
        seconds: how long a member waits for the others at most, here and before each broadcast.

    Raises:
        RuntimeError: the store cannot be opened or reached.

    Attributes:
        device: this process's NPU.
        port: where the store listens.
    """

    def __init__(self, host: str, port: int, rank: int, size: int, seconds: float) -> None:
        """Open the trainer's store (rank 0), or reach it."""
        self.device = torch.device("npu", torch.accelerator.current_device_index())
        self._rank, self._size, self._seconds = rank, size, seconds
        self._where, self._broadcasts = f"{host}:{port}", 0
        self._group: dist.ProcessGroup | None = None
        self._store: Any  # None once this member has left
        waits = timedelta(seconds=seconds)
        try:
            self._store = dist.TCPStore(host, port, None, rank == 0, waits, wait_for_workers=False)  # type: ignore[attr-defined]  # missing in torch's stubs
        except (RuntimeError, dist.DistError) as error:
            does = "cannot listen" if rank == 0 else "cannot be reached"
            raise RuntimeError(
                f"weight transfer: the trainer's store at master_address:master_port ({self._where}) {does}: {error}"
            ) from error
        self.port = int(self._store.port)

    def join(self) -> None:
        """Form the group of HCCL. All members call it.

        Raises:
            RuntimeError: a member has failed, or two members use one device.
            TimeoutError: a member did not come.
        """
        if self._rank:
            self._store.set(f"device/{self._rank}", self._own_device())
            self._meet(lambda: self._store.check([_NAME]), "the trainer")
        else:
            self._gather()
            self._store.set(_NAME, f"weight_transfer_{uuid4().hex}")
        name = cast("GroupName", self._store.get(_NAME).decode())
        # What torch.distributed.init_process_group does for its one default group, which is another one here or none.
        group, _ = c10d._new_process_group_helper(
            self._size, self._rank, [], "hccl", self._store, name, timeout=timedelta(seconds=self._seconds)
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self._size)}
        self._group = group

    def broadcast(self, tensor: torch.Tensor, src: int = 0, stream: Any = None) -> None:
        """Send a tensor of rank 0 into those of all others, in the order of the current stream.

        Args:
            tensor: contiguous, on `device`, of one shape and type on all members.
            src: 0.
            stream: None or the current one; vLLM gives it.

        Raises:
            RuntimeError: a member has failed.
            TimeoutError: a member did not come.
        """
        assert src == 0
        assert self._group is not None
        self._broadcasts += 1
        if self._rank:
            self._ask(lambda: self._store.add(_WAITING, 1))
            self._meet(lambda: self._store.add(_SENT, 0) >= self._broadcasts, "the trainer")
        else:
            self._meet(lambda: self._store.add(_WAITING, 0) == self._broadcasts * (self._size - 1), "a worker")
            self._store.add(_SENT, 1)
        self._group.broadcast(tensor, src).wait()

    def fail(self, error: BaseException) -> None:
        """Tell all members that wait, or will, that this one has failed. The first message stays."""
        if self._store is None:
            return
        with suppress(RuntimeError, dist.DistError):  # the store may be what failed
            self._store.compare_set(_FAILED, "", f"rank {self._rank}: {type(error).__name__}: {error}")

    def destroy(self) -> None:
        """Leave the group. Others that wait for this member fail."""
        self.fail(RuntimeError("has left the transfer"))
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        self._store = None  # the trainer's port is free again

    def _gather(self) -> None:
        """Wait for all others; RuntimeError where HCCL would be given one device twice."""
        keys = [f"device/{rank}" for rank in range(1, self._size)]
        self._meet(lambda: self._store.check(keys), "a worker")
        ranks = {self._own_device(): 0}
        for rank, key in enumerate(keys, 1):
            device = self._store.get(key).decode()
            if device in ranks:
                error = RuntimeError(
                    f"ranks {ranks[device]} and {rank} of the transfer are on one NPU ({device}), and HCCL takes one rank a device; "
                    "give the trainer another one (torch.npu.set_device, ASCEND_RT_VISIBLE_DEVICES)"
                )
                self.fail(error)
                raise error
            ranks[device] = rank

    def _own_device(self) -> str:
        visible = (envs.visible_devices() or "").split(",")
        index = self.device.index
        return f"device {visible[index] if index < len(visible) and visible[index] else index} of {os.uname().nodename}"

    def _meet(self, done: Callable[[], bool], who: str) -> None:
        """Wait until `done`, or until a member has failed."""
        ends = time.monotonic() + self._seconds
        while not self._ask(done):
            if self._ask(lambda: self._store.check([_FAILED])):
                raise RuntimeError(
                    f"weight transfer failed at {self._store.get(_FAILED).decode()}; initialise the transfer anew on both sides"
                )
            if time.monotonic() > ends:
                error = TimeoutError(f"weight transfer: {who} did not come within {self._seconds} s (timeout_seconds)")
                self.fail(error)
                raise error
            time.sleep(_POLL_SECONDS)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """An answer of the store; RuntimeError if it is gone, and the trainer with it."""
        try:
            return question()
        except (RuntimeError, dist.DistError) as error:
            raise RuntimeError(
                f"weight transfer: the trainer at {self._where} is gone ({type(error).__name__}); initialise the transfer anew on both sides"
            ) from error
