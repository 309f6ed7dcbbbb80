# SPDX-License-Identifier: Apache-2.0
"""One communication group: the `CommGroup` protocol, `TorchGroup` over torch.distributed, and `Solo` of one rank.

The protocol shares names and arguments with vLLM's GroupCoordinator (`rank_in_group`, `world_size`, `ranks`,
`device_group`, `cpu_group`, `all_gather`, `reduce_scatter`, `all_reduce`, `broadcast`); `wrap` adds the rest to such an
object.

W below is the number of ranks of the group. Rank arguments (`src`) count within the group. All ranks call the same
collective in the same order with equal shapes and dtypes, except where splits are given. Work is issued on the current
stream.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from ascend_comm.collectives import (
    Pending,
    axis_of,
    check_source,
    check_splits,
    hccl_comm_name,
    start_all_to_all,
    start_broadcast,
)

__all__ = ["CommGroup", "Coordinator", "Solo", "TorchGroup", "wrap"]


@runtime_checkable
class Coordinator(Protocol):
    """What vLLM's GroupCoordinator offers of a group. `CommGroup` extends it."""

    @property
    def rank_in_group(self) -> int:
        """Rank of this process in the group, 0 to W - 1."""

    @property
    def world_size(self) -> int:
        """W."""

    @property
    def ranks(self) -> list[int]:
        """Global ranks of the members, in group order."""

    @property
    def device_group(self) -> Any:
        """The ProcessGroup for device tensors; None where there is none."""

    @property
    def cpu_group(self) -> Any:
        """The ProcessGroup (gloo) for CPU tensors and objects; None where there is none."""

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """The ranks' tensors joined along `dim`: size n there becomes W * n."""

    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        """The sum over ranks, cut along `dim` into W equal parts, of which this rank gets its own."""

    def all_reduce(self, input_: Tensor) -> Tensor:
        """The sum over ranks. Use only the result: `input_` may or may not have been overwritten."""

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """`input_` of group rank `src`, written into `input_` everywhere, which is returned."""


@runtime_checkable
class CommGroup(Coordinator, Protocol):
    """A communication group."""

    def broadcast_async(self, input_: Tensor, src: int = 0) -> Pending:
        """`broadcast` that returns at once. `input_` must not be touched before ``wait()`` of the handle."""

    def all_to_all(
        self, input_: Tensor, output_splits: Sequence[int] | None = None, input_splits: Sequence[int] | None = None
    ) -> Tensor:
        """Part i of dim 0 goes to rank i; the parts received are joined along dim 0 in rank order.

        Args:
            input_: ``[sum(input_splits), ...]``.
            output_splits: rows to receive from each rank; None: equal parts.
            input_splits: rows to send to each rank; None exactly when `output_splits` is.

        Returns:
            ``[sum(output_splits), ...]``.

        Raises:
            ValueError: splits that do not fit.
        """

    def all_to_all_async(
        self, input_: Tensor, output_splits: Sequence[int] | None = None, input_splits: Sequence[int] | None = None
    ) -> tuple[Tensor, Pending]:
        """`all_to_all` that returns at once; the tensor is valid after ``wait()`` of the handle."""

    def comm_name(self) -> str:
        """The HCCL communicator's name, which the fused communication kernels take.

        Raises:
            RuntimeError: the group does not run over HCCL.
        """


def wrap(coordinator: Coordinator) -> CommGroup:
    """A `CommGroup` over an object like vLLM's GroupCoordinator.

    The collectives that it has stay its own (so that vLLM's device communicator is used); those that it lacks run over
    its `device_group`. A `CommGroup` is returned as it is.

    Raises:
        TypeError: the object lacks something that `Coordinator` names.
    """
    if isinstance(coordinator, CommGroup):
        return coordinator
    names = (
        "rank_in_group",
        "world_size",
        "ranks",
        "device_group",
        "cpu_group",
        "all_gather",
        "reduce_scatter",
        "all_reduce",
        "broadcast",
    )
    if missing := [name for name in names if not hasattr(coordinator, name)]:
        raise TypeError(f"coordinator={coordinator!r} is no communication group: it lacks {', '.join(missing)}")
    return _Wrapped(coordinator)


class TorchGroup:
    """A `CommGroup` over ProcessGroups of torch.distributed. It does not own them.

    Args:
        device_group: a ProcessGroup that this process is in, for the collectives.
        cpu_group: one over the same ranks for CPU tensors and objects; by default `device_group`.

    Raises:
        ValueError: this process is not in `device_group`.
    """

    def __init__(self, device_group: Any, cpu_group: Any = None) -> None:
        """Store the groups, and this rank's place in them."""
        rank = dist.get_rank(device_group)
        if rank < 0:
            raise ValueError(f"device_group={device_group!r}: rank {dist.get_rank()} of the world is not in it")
        self.device_group = device_group
        self.cpu_group = device_group if cpu_group is None else cpu_group
        self.ranks: list[int] = dist.get_process_group_ranks(device_group)
        self.world_size = len(self.ranks)
        self.rank_in_group = rank

    def __repr__(self) -> str:
        """The members, and which of them this is."""
        return f"TorchGroup(ranks={self.ranks}, rank_in_group={self.rank_in_group})"

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """See `Coordinator`. Without copies beside the collective's own for dim 0."""
        axis = axis_of(input_, dim)
        source = input_.contiguous()
        joined = source.new_empty((self.world_size * source.shape[0], *source.shape[1:]))
        dist.all_gather_single(joined, source, group=self.device_group)
        if axis == 0:
            return joined
        stacked = joined.view(self.world_size, *source.shape).movedim(0, axis)
        return stacked.flatten(axis, axis + 1)

    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        """See `Coordinator`.

        Raises:
            ValueError: the size along `dim` is no multiple of W.
        """
        axis = axis_of(input_, dim)
        if input_.shape[axis] % self.world_size:
            raise ValueError(
                f"input_ of shape {tuple(input_.shape)}: dim {axis} must be a multiple of the group's "
                f"{self.world_size} ranks"
            )
        source = input_.movedim(axis, 0).contiguous()
        part = source.new_empty((source.shape[0] // self.world_size, *source.shape[1:]))
        dist.reduce_scatter_single(part, source, group=self.device_group)
        return part.movedim(0, axis).contiguous()

    def all_reduce(self, input_: Tensor) -> Tensor:
        """See `Coordinator`. A contiguous `input_` is overwritten."""
        result = input_.contiguous()
        dist.all_reduce(result, group=self.device_group)
        return result

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """See `Coordinator`."""
        self.broadcast_async(input_, src).wait()
        return input_

    def broadcast_async(self, input_: Tensor, src: int = 0) -> Pending:
        """See `CommGroup`."""
        return start_broadcast(input_, src, self.ranks, self.device_group)

    def all_to_all(
        self, input_: Tensor, output_splits: Sequence[int] | None = None, input_splits: Sequence[int] | None = None
    ) -> Tensor:
        """See `CommGroup`."""
        output, pending = self.all_to_all_async(input_, output_splits, input_splits)
        pending.wait()
        return output

    def all_to_all_async(
        self, input_: Tensor, output_splits: Sequence[int] | None = None, input_splits: Sequence[int] | None = None
    ) -> tuple[Tensor, Pending]:
        """See `CommGroup`."""
        return start_all_to_all(input_, output_splits, input_splits, self.device_group)

    def comm_name(self) -> str:
        """See `CommGroup`."""
        return hccl_comm_name(self.device_group)


class _Wrapped(TorchGroup):
    """A coordinator's own collectives, and ours over its `device_group`."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator.device_group, coordinator.cpu_group)
        self._coordinator = coordinator

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        return self._coordinator.all_gather(input_, dim)

    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        return self._coordinator.reduce_scatter(input_, dim)

    def all_reduce(self, input_: Tensor) -> Tensor:
        return self._coordinator.all_reduce(input_)

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        return self._coordinator.broadcast(input_, src)


class Solo:
    """The group of one rank: every collective is the identity. It checks its arguments like the others.

    Args:
        rank: global rank of the only member.
    """

    world_size = 1
    rank_in_group = 0
    device_group = None
    cpu_group = None

    def __init__(self, rank: int = 0) -> None:
        """Store the rank."""
        self.ranks = [rank]

    def __repr__(self) -> str:
        """The member."""
        return f"Solo(rank={self.ranks[0]})"

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """See `Coordinator`."""
        axis_of(input_, dim)
        return input_

    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        """See `Coordinator`."""
        axis_of(input_, dim)
        return input_

    def all_reduce(self, input_: Tensor) -> Tensor:
        """See `Coordinator`."""
        return input_

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """See `Coordinator`."""
        check_source(input_, src, 1)
        return input_

    def broadcast_async(self, input_: Tensor, src: int = 0) -> Pending:
        """See `CommGroup`."""
        check_source(input_, src, 1)
        return Pending(None)

    def all_to_all(
        self, input_: Tensor, output_splits: Sequence[int] | None = None, input_splits: Sequence[int] | None = None
    ) -> Tensor:
        """See `CommGroup`."""
        splits = check_splits(input_, output_splits, input_splits, 1)
        if splits is not None and splits[0] != splits[1]:
            raise ValueError(f"output_splits={splits[0]}: one rank receives what it sends, {splits[1]}")
        return input_

    def all_to_all_async(
        self, input_: Tensor, output_splits: Sequence[int] | None = None, input_splits: Sequence[int] | None = None
    ) -> tuple[Tensor, Pending]:
        """See `CommGroup`."""
        return self.all_to_all(input_, output_splits, input_splits), Pending(None)

    def comm_name(self) -> str:
        """See `CommGroup`."""
        raise RuntimeError(
            f"a group of one rank ({self.ranks[0]}) has no HCCL communicator; call the kernel without communication"
        )
