# SPDX-License-Identifier: Apache-2.0
"""What a CommGroup adds to vLLM's GroupCoordinator, over a ProcessGroup of torch.distributed, and argument checks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Pending",
    "axis_of",
    "check_source",
    "check_splits",
    "hccl_comm_name",
    "start_all_to_all",
    "start_broadcast",
]


class Pending:
    """Handle of an asynchronous collective. It keeps the tensors of the collective alive until waited for."""

    __slots__ = ("_tensors", "_work")

    def __init__(self, work: dist.Work | None, *tensors: Tensor) -> None:
        """Wrap the handle of torch.distributed (None: already done) and the tensors to keep."""
        self._work = work
        self._tensors = tensors

    def wait(self) -> None:
        """Let what follows on the current stream (on CPU: the process) wait for the result. More calls do nothing."""
        if self._work is not None:
            self._work.wait()
        self._work = None
        self._tensors = ()


def hccl_comm_name(group: Any) -> str:
    """The HCCL communicator's name of a ProcessGroup, creating the communicator if need be.

    The current NPU must be the one that the group uses. Source: op-plugin, "get_hccl_comm_name": it takes the *global*
    rank.

    Raises:
        RuntimeError: the group has no HCCL backend.
    """
    backends = str(dist.get_backend_config(group))
    if "hccl" not in backends:
        raise RuntimeError(
            f"only an HCCL group has a communicator name, and this one runs over {backends!r}; "
            "initialise torch.distributed with backend 'hccl'"
        )
    rank = dist.get_global_rank(group, dist.get_rank(group))
    return str(group._get_backend(torch.device("npu")).get_hccl_comm_name(rank))


def axis_of(input_: Tensor, dim: int) -> int:
    """`dim` as an index from 0, or ValueError."""
    if not -input_.dim() <= dim < input_.dim():
        raise ValueError(f"dim={dim}: the tensor has shape {tuple(input_.shape)}")
    return dim % input_.dim()


def check_source(input_: Tensor, src: int, size: int) -> None:
    """Raise ValueError unless group rank `src` exists among `size` and `input_` can be written to."""
    if not 0 <= src < size:
        raise ValueError(f"src={src}: must be a rank in the group, 0 to {size - 1}")
    if not input_.is_contiguous():
        raise ValueError(
            f"input_ of shape {tuple(input_.shape)} and strides {input_.stride()}: "
            "a broadcast writes to it, so it must be contiguous"
        )


def check_splits(
    input_: Tensor, output_splits: Sequence[int] | None, input_splits: Sequence[int] | None, size: int
) -> tuple[list[int], list[int]] | None:
    """(output, input) splits as lists, None for equal parts."""
    rows = input_.shape[0] if input_.dim() else 0
    if input_.dim() == 0:
        raise ValueError("input_ has no dimension to split")
    if output_splits is None and input_splits is None:
        if rows % size:
            raise ValueError(f"input_ has {rows} rows: must be a multiple of the group's {size} ranks, or give splits")
        return None
    if output_splits is None or input_splits is None:
        raise ValueError(f"output_splits={output_splits}, input_splits={input_splits}: give both or none")
    for name, splits in (("output_splits", output_splits), ("input_splits", input_splits)):
        if len(splits) != size or min(splits) < 0:
            raise ValueError(
                f"{name}={list(splits)}: must be {size} counts of at least 0, one for each rank of the group"
            )
    if sum(input_splits) != rows:
        raise ValueError(f"input_splits={list(input_splits)}: must add up to the {rows} rows of input_")
    return list(output_splits), list(input_splits)


def start_broadcast(input_: Tensor, src: int, ranks: Sequence[int], group: Any) -> Pending:
    """Start the broadcast of `input_` from group rank `src` of the global `ranks` of `group`."""
    check_source(input_, src, len(ranks))
    return Pending(dist.broadcast(input_, ranks[src], group=group, async_op=True), input_)


def start_all_to_all(
    input_: Tensor, output_splits: Sequence[int] | None, input_splits: Sequence[int] | None, group: Any
) -> tuple[Tensor, Pending]:
    """Start the exchange over `group`; see `CommGroup.all_to_all_async`."""
    splits = check_splits(input_, output_splits, input_splits, dist.get_world_size(group))
    source = input_.contiguous()
    if splits is None:
        output = torch.empty_like(source)
        work = dist.all_to_all_single(output, source, group=group, async_op=True)
    else:
        output = source.new_empty((sum(splits[0]), *source.shape[1:]))
        work = dist.all_to_all_single(output, source, *splits, group=group, async_op=True)
    return output, Pending(work, source, output)
