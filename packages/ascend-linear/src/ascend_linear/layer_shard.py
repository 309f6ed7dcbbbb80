# SPDX-License-Identifier: Apache-2.0
"""Layer sharding: the weights of a series of equal layers are spread over ranks and streamed to the others in time.

Each rank keeps every W-th layer of the series (W ranks in the group, all of which would hold the same weights) and
receives the others by broadcast, `prefetch_step` layers before it needs them, into a few buffers that all layers share.
Memory per rank falls from L weights to ``ceil(L / W) + prefetch_step + 1``.

A series starts where its pipeline stage does and may leave layers out: only the order in which layers are added counts.
"""

import torch
from ascend_comm import CommGroup, Pending
from torch import Tensor

__all__ = ["LayerShard", "StreamedWeight"]


class StreamedWeight:
    """The weight of one layer of a `LayerShard`, for `LinearParams.streamed`."""

    __slots__ = ("_layer", "_shard")

    def __init__(self, shard: "LayerShard", layer: int) -> None:
        """Note where it comes from."""
        self._shard = shard
        self._layer = layer

    def get(self) -> Tensor:
        """See `LayerShard.wait`."""
        return self._shard.wait(self._layer)


class LayerShard:
    """The weights of one series. All ranks of the group go through the same layers in the same order.

    `add` each layer in the model's order, load the weights, `start`, and then in every step `reach` a layer before its
    weight is needed (which starts a broadcast) and `wait` for it. After the last layer comes the first one of the next
    step. After an aborted step `start` again, on all ranks. A step that is captured in a graph streams all its weights itself:
    `finish` what the step before has begun, `start` for one step alone, and `finish` once more where the graph ends.

    Args:
        group: ranks that would hold the same weights (`GroupConfig.layer_sharding` builds it as "shard_weight", with a
            communicator of its own, so that it overlaps with the layers' collectives).
        prefetch_step: how many layers ahead a broadcast starts: 0 (when the layer itself is reached) to L - 2.

    Raises:
        ValueError: `prefetch_step` below 0.
    """

    def __init__(self, group: CommGroup, *, prefetch_step: int = 1) -> None:
        """Without layers yet."""
        if prefetch_step < 0:
            raise ValueError(f"prefetch_step={prefetch_step}: must be at least 0")
        self.group = group
        self.prefetch_step = prefetch_step
        self._weights: list[Tensor] = []
        self._position: dict[int, int] = {}
        self._windows: list[Tensor] = []
        self._holds: list[int | None] = []  # for each window the position whose weight it has, or is about to have
        self._pending: list[Pending | None] = []
        self._next_window = 0
        self._reached = -1
        self._started = False
        self._once = False
        self.finished = True
        """Whether nothing is under way: `start` comes next."""

    def __contains__(self, layer: int) -> bool:
        """Whether the layer is in the series."""
        return layer in self._position

    def add(self, layer: int, weight: Tensor) -> StreamedWeight:
        """Append a layer.

        Args:
            layer: its index in the model.
            weight: contiguous and in a plain (ND) layout, of the same shape and type in all layers. Ranks that do not
                keep the layer lose it at `start`; they need not load it (`keeps`).

        Raises:
            ValueError: a layer that does not come after the last one, or a weight unlike the first one.
            RuntimeError: the series has started.
        """
        if self._started:
            raise RuntimeError(f"layer {layer} added after start: add all layers first")
        if self._position and layer <= max(self._position):
            raise ValueError(f"layer={layer}: must come after layer {max(self._position)}, which was added before")
        if not weight.is_contiguous():
            raise ValueError(f"weight of layer {layer} with strides {weight.stride()}: must be contiguous")
        if self._weights and (weight.shape, weight.dtype) != (self._weights[0].shape, self._weights[0].dtype):
            raise ValueError(
                f"weight of layer {layer}, {weight.dtype} {tuple(weight.shape)}: must be like the first one's, "
                f"{self._weights[0].dtype} {tuple(self._weights[0].shape)}"
            )
        self._position[layer] = len(self._weights)
        self._weights.append(weight)
        return StreamedWeight(self, layer)

    def owner(self, layer: int) -> int:
        """The rank in the group that keeps the layer: its position in the series modulo W.

        Raises:
            ValueError: the layer is not in the series.
        """
        return self._at(layer) % self.group.world_size

    def keeps(self, layer: int) -> bool:
        """Whether this rank keeps the layer, and so has to load it. ValueError as `owner`."""
        return self.owner(layer) == self.group.rank_in_group

    @property
    def memory_bytes(self) -> int:
        """Device memory of what this rank holds of the series, buffers included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self._weights, *self._windows])

    def start(self, *, once: bool = False) -> None:
        """Free what other ranks keep and start the broadcasts of the first `prefetch_step` layers.

        Collective. Again after an aborted step or `finish`: the next layer to reach is then the first one.

        Args:
            once: for one step, after whose last layer no broadcast for a next one is under way.

        Raises:
            ValueError: fewer than two layers, or `prefetch_step` above L - 2.
        """
        layers = len(self._weights)
        if self.prefetch_step > layers - 2:
            raise ValueError(
                f"prefetch_step={self.prefetch_step}: with {layers} layers it must be 0 to {layers - 2}; "
                "a series needs two layers or more"
            )
        if not self._started:
            self._allocate()
        self.finish()
        self._started, self._once, self.finished = True, once, False
        self._reached = -1
        self._holds = [None] * len(self._windows)
        for position in range(self.prefetch_step):
            self._broadcast(position)

    def finish(self, *, wait: bool = True) -> None:
        """Wait for the broadcasts that are under way (on an NPU: what follows on the current stream waits).

        Args:
            wait: False drops them, for those of a capture that failed never run.
        """
        for pending in self._pending:
            if pending is not None and wait:
                pending.wait()
        self._pending = [None] * len(self._windows)
        self.finished = True

    def reach(self, layer: int) -> None:
        """Start the broadcast of the layer `prefetch_step` after this one, beyond the last one of the first ones.

        Again for the same layer does nothing.

        Raises:
            ValueError: the layer is not in the series.
            RuntimeError: not started, or another layer is due.
        """
        position, layers = self._at(layer), len(self._weights)
        if self.finished:
            raise RuntimeError(f"layer {layer} reached before start")
        if position == self._reached:
            return
        if position != (self._reached + 1) % layers:
            due = list(self._position)[(self._reached + 1) % layers]
            raise RuntimeError(
                f"layer {layer} reached where layer {due} is due; after an aborted step call start on all ranks"
            )
        self._reached = position
        following = position + self.prefetch_step
        if following < layers or not self._once:
            self._broadcast(following % layers)

    def wait(self, layer: int) -> Tensor:
        """The layer's weight, once its broadcast is done (on an NPU: what follows on the current stream waits).

        It is valid until the next layer is reached.

        Raises:
            ValueError: the layer is not in the series.
            RuntimeError: it is not the layer that was reached last.
        """
        position = self._at(layer)
        if position != self._reached:
            raise RuntimeError(f"the weight of layer {layer} is asked for, but that layer was not reached last")
        if self.group.world_size == 1:
            return self._weights[position]
        window = self._holds.index(position)
        pending, self._pending[window] = self._pending[window], None
        if pending is not None:
            pending.wait()
        return self._weights[position] if self.keeps(layer) else self._windows[window]

    def _at(self, layer: int) -> int:
        if layer not in self._position:
            raise ValueError(f"layer={layer}: not in the series, which has {list(self._position)}")
        return self._position[layer]

    def _allocate(self) -> None:
        """The buffers, and an empty tensor in the place of each weight that another rank keeps."""
        if self.group.world_size == 1:
            return
        like = self._weights[0]
        shape, dtype, device = like.shape, like.dtype, like.device
        for layer, position in self._position.items():
            if not self.keeps(layer):
                weight = self._weights[position]
                weight.data = weight.data.new_empty(0)
        self._windows = [torch.empty(shape, dtype=dtype, device=device) for _ in range(self.prefetch_step + 1)]

    def _broadcast(self, position: int) -> None:
        """Start a broadcast into the window that has waited longest: its layer has been computed by now."""
        if self.group.world_size == 1:
            return
        window = self._next_window
        self._next_window = (window + 1) % len(self._windows)
        unused = self._pending[window]
        if unused is not None:
            unused.wait()
        source = position % self.group.world_size
        mine = source == self.group.rank_in_group
        target = self._weights[position].data if mine else self._windows[window]
        self._pending[window] = self.group.broadcast_async(target, source)
        self._holds[window] = position
