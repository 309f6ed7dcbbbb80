# SPDX-License-Identifier: Apache-2.0
"""The `hccl` backend of torch.distributed, over Gloo. The tensors' way to Gloo is in `native/comm.cpp`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _DistributedBackendOptions, _resolve_process_group
from torch.distributed import distributed_c10d as c10d

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName

__all__ = ["SimulatedHCCL", "group_of", "install"]

# Name of the process group -> its backend. PyTorch keeps the C++ half of a backend only; this keeps the Python half of every group that lives.
_alive: dict[str, SimulatedHCCL] = {}

# What torch_npu calls on a backend itself, past the process group and so past the dispatcher.
_CALLED_DIRECTLY = ("allgather", "allreduce", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "recv", "reduce",
                    "reduce_scatter", "scatter", "send", "_allgather_base", "_reduce_scatter_base")  # fmt: skip


class SimulatedHCCL(dist.ProcessGroupGloo):
    """A Gloo group that answers what torch_npu's ProcessGroupHCCL answers."""

    def __init__(self, options: _DistributedBackendOptions) -> None:
        """Join the group that `options` describe (torch's extended backend API)."""
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
        gloo._devices = _gloo_devices()
        gloo._timeout = options.timeout
        super().__init__(options.store, options.group_rank, options.group_size, gloo)
        self.group_name = cast("GroupName", options.group_id)
        self.global_ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
        self._comm_name = f"hccl_{options.group_id}_{'-'.join(map(str, self.global_ranks))}"

    def get_hccl_comm_name(self, rank: int, init_comm: bool = True) -> str:
        """Name of this group's communicator.

        Args:
            rank: this process's rank in the whole job. torch_npu takes it modulo the number of devices, to find the device whose communicator
                is meant; so must it be here.
            init_comm: accepted for torch_npu's sake; the communicator exists since the group does.

        Raises:
            ValueError: `rank` is negative, or stands for another device than that of this process.
        """
        own, devices = self.global_ranks[self.rank()], torch.accelerator.device_count()
        if rank < 0 or rank % devices != own % devices:
            raise ValueError(
                f"get_hccl_comm_name: rank is {rank}; it must be this process's rank in the whole job, {own} (torch.distributed.get_rank())"
            )
        return self._comm_name

    def process_group(self) -> dist.ProcessGroup:
        """The process group that this backend serves."""
        return _resolve_process_group(self.group_name)

    def batch_isend_irecv(
        self, op_type: Sequence[str], tensors: Sequence[torch.Tensor], remote_rank_list: Sequence[int]
    ) -> dist.Work:
        """Start all of the sends and receives; one handle for them, as from torch_npu's ProcessGroupHCCL."""
        group = self.process_group()
        start = {"isend": group.send, "irecv": group.recv}
        return _All(
            [start[op]([tensor], peer, 0) for op, tensor, peer in zip(op_type, tensors, remote_rank_list, strict=True)]
        )


def _gloo_devices() -> list[Any]:
    """One device for each network interface that GLOO_SOCKET_IFNAME names, separated by commas, as torch's own Gloo groups have it.

    Raises:
        ValueError: there is no such interface, or it has no address.
    """
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    devices = []
    for name in names:
        try:
            devices.append(dist.ProcessGroupGloo.create_device(interface=name))
        except (RuntimeError, ValueError) as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise ValueError(
                f"GLOO_SOCKET_IFNAME is {','.join(names)!r}: {name!r} cannot be used ({error}); interfaces here: {known}"
            ) from error
    return devices or [dist.ProcessGroupGloo.create_default_device()]


class _All(dist.Work):
    """Work that is done when all of its parts are."""

    def __init__(self, parts: Sequence[dist.Work]) -> None:
        super().__init__()
        self._parts = parts

    def wait(self, timeout: timedelta | None = None) -> bool:
        for part in self._parts:
            part.wait() if timeout is None else part.wait(timeout)
        return True

    def is_completed(self) -> bool:
        return all(part.is_completed() for part in self._parts)


def _through_the_group(name: str) -> Callable[..., Any]:
    """A method of the backend that takes the way of every other call: by the dispatcher, which finds the kernel for npu tensors."""

    def method(self: SimulatedHCCL, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.process_group(), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _CALLED_DIRECTLY:
    setattr(SimulatedHCCL, _name, _through_the_group(_name))


def group_of(comm_name: str) -> SimulatedHCCL:
    """The group whose communicator has this name; RuntimeError where this process is in no such group."""
    _forget_destroyed()
    for backend in _alive.values():
        if backend._comm_name == comm_name:
            return backend
    raise RuntimeError(
        f"no HCCL communicator is named {comm_name!r} in this process; take the name from group.get_hccl_comm_name(rank)"
    )


def install() -> None:
    """Replace torch_npu's creator of `hccl` groups."""
    plugin = dist.Backend._plugins["HCCL"]
    dist.Backend._plugins["HCCL"] = plugin._replace(creator_fn=_create)


def _create(options: _DistributedBackendOptions, pg_options: object) -> SimulatedHCCL:
    _forget_destroyed()
    if folder := os.environ.get("ASCEND_SIM_COLLECTIVES"):
        torch.ops.ascend_sim.log_collectives(folder)
    backend = _alive[options.group_id] = SimulatedHCCL(options)
    return backend


def _forget_destroyed() -> None:
    for name in _alive.keys() - set(c10d._world.pg_names.values()):
        del _alive[name]
