# SPDX-License-Identifier: Apache-2.0
"""`GroupSet`: creates the communicators that a `GroupConfig` asks for, hands out groups by name, and closes them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from ascend_comm.config import GroupConfig, Handle, memory_bytes, plan
from ascend_comm.group import CommGroup, Solo, TorchGroup
from ascend_comm.hccl import HcclOptions
from ascend_comm.kernels import hccl_process_group_options

__all__ = ["GroupSet"]

_BACKENDS = ("hccl", "gloo")
_MB = 2**20


def _resolve_backend(backend: str | None) -> str:
    chosen = dist.get_backend() if backend is None else backend
    if chosen not in _BACKENDS:
        origin = "that of the default process group; " if backend is None else ""
        raise ValueError(f"backend={chosen!r}: {origin}must be one of {', '.join(_BACKENDS)}")
    return chosen


def _check_world(config: GroupConfig) -> int:
    """The rank of this process, after checking that torch.distributed runs the world that the topology describes."""
    expected = config.topology.world_size
    if not dist.is_initialized():
        if expected > 1:
            raise RuntimeError(
                f"world_size={expected} needs torch.distributed: "
                "call torch.distributed.init_process_group before GroupSet"
            )
        return 0
    if dist.get_world_size() != expected:
        raise ValueError(f"topology.world_size={expected}: torch.distributed runs {dist.get_world_size()} ranks")
    return dist.get_rank()


def _check_memory(needed: int, free: int) -> None:
    """Raise MemoryError on all ranks if the buffers of any do not fit. A lone failure would leave the rest waiting."""
    short: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(short, max(needed - free, 0))
    if lacking := {rank: missing for rank, missing in enumerate(short) if missing}:
        where = ", ".join(f"rank {rank} lacks {missing / _MB:.0f} MB" for rank, missing in lacking.items())
        raise MemoryError(
            f"the HCCL buffers of the groups do not fit: {where} "
            f"(this rank needs {needed / _MB:.0f} MB of {free / _MB:.0f} MB free). "
            "Lower HCCL_BUFFSIZE and hccl_buffsize_mb, leave more memory free, or turn options off"
        )


def _new_group(handle: Handle, backend: str, options: HcclOptions | None, timeout: timedelta | None) -> Any:
    """The ProcessGroup of a handle, on ranks outside it torch's marker for that. All ranks of the world call this."""
    pg_options = None
    if backend == "hccl" and options is not None and options.buffer_mb is not None:
        pg_options = hccl_process_group_options(options.buffer_mb)
    description = f"ascend_comm:{'+'.join(handle.names)}:{backend}"
    return dist.new_group(list(handle.ranks), timeout, backend, pg_options, group_desc=description)


def _destroy(group: Any) -> None:
    """Destroy a ProcessGroup, unless torch.distributed has already been shut down as a whole."""
    if dist.is_initialized():
        dist.destroy_process_group(group)


class GroupSet(Mapping[str, CommGroup]):
    """The groups of a config, as a mapping from their names to the group that this rank is in.

    Construction and `close` are collective: every rank of the world takes part, with the same config. Groups of equal
    ranks and options share one communicator, and a group of one rank is a `Solo`.

    Args:
        config: what to build.
        backend: "hccl" or "gloo"; by default that of the default process group. Beside an hccl communicator there is
            always a gloo one, as `cpu_group`.
        free_memory: free device memory in bytes, to check the HCCL buffers against; None does not check. Give it on all
            ranks or on none.
        timeout: of the collectives; torch's default if None.

    Raises:
        ValueError: the topology is not the world that torch.distributed runs, or an unknown backend.
        MemoryError: the buffers do not fit on some rank; raised on all of them, before anything is created.
        RuntimeError: torch.distributed is not initialised, or torch_npu is missing for "hccl".
    """

    def __init__(
        self,
        config: GroupConfig,
        *,
        backend: str | None = None,
        free_memory: int | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        """Create the communicators."""
        self._stack = ExitStack()
        self._closed = False
        self.rank = _check_world(config)
        self.config = config
        if dist.is_initialized():
            backend = _resolve_backend(backend)
            if free_memory is not None:
                _check_memory(memory_bytes(config, self.rank), free_memory)
        handles = plan(config)
        with ExitStack() as stack:
            made = [self._create(handle, backend or "gloo", timeout, stack) for handle in handles]
            self._stack = stack.pop_all()
        self.handles = tuple(handle for handle, group in zip(handles, made, strict=True) if group is not None)
        by_name = {name: group for handle, group in zip(handles, made, strict=True) if group for name in handle.names}
        self._groups: dict[str, CommGroup] = {
            name: by_name[name] if name in by_name else Solo(self.rank) for name in config.families()
        }

    def _create(self, handle: Handle, backend: str, timeout: timedelta | None, stack: ExitStack) -> TorchGroup | None:
        device_group = _new_group(handle, backend, handle.options, timeout)
        cpu_group = device_group if backend == "gloo" else _new_group(handle, "gloo", None, timeout)
        if self.rank not in handle.ranks:
            return None
        for group in {id(g): g for g in (device_group, cpu_group)}.values():
            stack.callback(_destroy, group)
        return TorchGroup(device_group, cpu_group)

    def __getitem__(self, name: str) -> CommGroup:
        """The group called `name` that this rank is in.

        Raises:
            KeyError: the config does not ask for it (use `get` for None).
            RuntimeError: the set is closed.
        """
        if self._closed:
            raise RuntimeError(f"group {name!r} of a closed GroupSet")
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of creation."""
        return iter(self._groups)

    def __len__(self) -> int:
        """The number of names."""
        return len(self._groups)

    def __enter__(self) -> Self:
        """The set itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Destroy each communicator once, the youngest first. More calls do nothing."""
        self._closed = True
        self._stack.close()
