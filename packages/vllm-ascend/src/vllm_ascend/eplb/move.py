# SPDX-License-Identifier: Apache-2.0
"""The way of experts from rank to rank: into buffers beside the steps, and from there into their slots between two steps.

Legend: B experts that a rank receives in one batch, K slots of a rank, E experts, N transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ascend_comm import CommGroup
from ascend_eplb import Placement
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Buffers", "MovableLayer", "Mover", "NoMemoryError", "check_tensors", "slot_bytes"]

_Signature = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MovableLayer:
    """A MoE layer of this rank.

    Args:
        name: of the layer, for messages.
        placed: where its experts lie at first, one layer.
        number: the decoder layer that it is.
        tensors: everything that is kept for an expert, `[K, ...]` each.
        heat: int32 `[E]`, the tokens of this rank.
        place: takes a placement of one layer, and changes the layer's maps in place.
    """

    name: str
    placed: Placement
    number: int
    tensors: Mapping[str, Tensor]
    heat: Tensor
    place: Callable[[Placement], None]


class NoMemoryError(RuntimeError):
    """Some rank has no memory for the buffers; raised on all ranks."""


def check_tensors(name: str, tensors: Mapping[str, Tensor], slots: int) -> None:
    """Check that the tensors of a layer's experts can be moved slot by slot.

    Raises:
        ValueError: one that has no row for each slot, or whose rows do not lie in one piece each; names the layer and the tensor.
    """
    for tensor, values in tensors.items():
        if values.dim() < 1 or len(values) != slots or not values.is_contiguous():
            raise ValueError(
                f"{name}: {tensor} of shape {list(values.shape)} and strides {list(values.stride())} cannot be moved: it must be contiguous, with a row "
                f"for each of the {slots} slots"
            )


def slot_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of one slot."""
    return sum(values[0].numel() * values.element_size() for values in tensors.values())


class Buffers:
    """Spare memory for the experts that a rank receives in one batch: one set for each form of layer, of which most models have one.

    Args:
        layers: the tensors of each layer.
        experts: B.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """

    def __init__(self, layers: Sequence[Mapping[str, Tensor]], experts: int) -> None:
        """Take the memory."""
        self._of: dict[_Signature, dict[str, Tensor]] = {}
        for form, tensors in {_signature(tensors): tensors for tensors in layers}.items():
            self._of[form] = {name: values.new_empty((experts, *values.shape[1:])) for name, values in tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return sum(part.numel() * part.element_size() for parts in self._of.values() for part in parts.values())

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`[B, ...]` for each tensor of a layer."""
        return self._of[_signature(tensors)]


def _with_memory(group: CommGroup, layers: Sequence[Mapping[str, Tensor]], experts: int) -> Buffers:
    """The buffers; NoMemoryError on all ranks where they do not fit on one. This is the first collective of the communicator, which all ranks must join."""
    buffers, lacking = None, ""
    try:
        buffers = Buffers(layers, experts)
    except torch.OutOfMemoryError as error:
        lacking = f": {error}"
    device = next(iter(layers[0].values())).device
    have = int(group.all_reduce(torch.tensor([int(buffers is not None)], device=device)).item())
    if buffers is None or have < group.world_size:
        raise NoMemoryError(
            f"{group.world_size - have} of {group.world_size} ranks have no memory for the buffers, of {experts} experts each "
            f"(eplb_config.move_buffer_experts){lacking}"
        )
    return buffers


def _signature(tensors: Mapping[str, Tensor]) -> _Signature:
    return tuple((name, tuple(values.shape[1:]), values.dtype) for name, values in tensors.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnTheWay:
    """A batch: its transfers, which of them this rank receives, and the events before and after its messages."""

    batch: NDArray[np.int32]
    received: NDArray[np.int32]
    begun: Any  # torch.npu.Event
    arrived: Any


class Mover:
    """Moves one batch at a time.

    Args:
        group: the ranks; its communicator is for this alone.
        layers: the tensors of each layer: everything that is kept for an expert.
        experts: B.
    """

    def __init__(self, group: CommGroup, layers: Sequence[Mapping[str, Tensor]], experts: int) -> None:
        """Take the buffers' memory, and open the communicator. All ranks do it together.

        Raises:
            NoMemoryError: the buffers do not fit on some rank.
        """
        self._group, self._layers = group, layers
        self._buffers = _with_memory(group, layers, experts)
        self._stream = torch.npu.Stream()
        self._on_the_way: _OnTheWay | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return self._buffers.num_bytes

    def start(self, batch: NDArray[np.int32]) -> None:
        """Begin a batch of one layer on a stream of its own; all ranks do, in the same step. Slots stay as they are until `commit`.

        Sources are sent from where they lie: no slot is written to before all ranks have said that their batch is complete. Sends and receives of two
        ranks are in the order of the batch on both.

        Args:
            batch: int32 `[N, 7]`, columns as in `decide.COLUMNS`.
        """
        assert self._on_the_way is None  # `commit` comes between two batches
        here = self._group.rank_in_group
        tensors = self._layers[batch[0, 1]]
        buffers = self._buffers.of(tensors)
        received = batch[batch[:, 5] == here]
        place = {tuple(row[5:]): number for number, row in enumerate(received.tolist())}
        messages = []
        for _, _, _, source, slot, target, target_slot in batch.tolist():
            for name, values in tensors.items():
                if source == here:
                    messages.append(self._message(dist.isend, values[slot], target))
                if target == here:
                    messages.append(self._message(dist.irecv, buffers[name][place[target, target_slot]], source))
        begun, arrived = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
        # For the last batch, which may have changed what is sent now.
        self._stream.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(self._stream):
            begun.record()
            for work in dist.batch_isend_irecv(messages) if messages else ():
                work.wait()  # holds up this stream, not the host
            arrived.record()
        self._on_the_way = _OnTheWay(batch=batch, received=received, begun=begun, arrived=arrived)

    def _message(self, kind: object, values: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, values, self._group.ranks[peer], self._group.device_group)  # type: ignore[arg-type]

    def is_complete(self) -> bool:
        """Whether everything that this rank sends and receives in the batch has arrived."""
        assert self._on_the_way is not None
        return bool(self._on_the_way.arrived.query())

    def commit(self) -> float:
        """Copy what was received into its slots, after all ranks have completed the batch, and before the next step is queued.

        Returns:
            The seconds that the messages of this rank took on the device.
        """
        assert self._on_the_way is not None
        moved, self._on_the_way = self._on_the_way, None
        torch.npu.current_stream().wait_event(moved.arrived)
        tensors = self._layers[moved.batch[0, 1]]
        buffers = self._buffers.of(tensors)
        for number, row in enumerate(moved.received.tolist()):
            for name, values in tensors.items():
                values[row[6]].copy_(buffers[name][number])
        return float(moved.begun.elapsed_time(moved.arrived)) / 1e3
