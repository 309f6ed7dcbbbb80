# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear layers with the ops of ascend-linear.

A layer asks for its op by its path. The op says which shard of the weight this rank holds, and is the layer's forward; the product is the plain
one, or what the layer's quantisation method has left at `quant`, or that method's own. Where there is no op, everything is vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from ascend_linear import (
    CustomLinearOp,
    LayerShard,
    LinearEnv,
    LinearParams,
    LinearResult,
    QuantMethod,
    Selected,
    StepState,
    StreamedWeight,
    get_replicated_op,
    in_tower,
    layer_index,
)
from torch import Tensor, nn
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from vllm_ascend import compat, kernels, parallel
from vllm_ascend.layers.select import select

__all__ = [
    "AscendColumnParallelLinear",
    "AscendMergedColumnParallelLinear",
    "AscendQKVParallelLinear",
    "AscendReplicatedLinear",
    "AscendRowParallelLinear",
    "WithOp",
    "finish_loading",
    "refuse_to_reload",
    "register",
]

# Module of `ascend_linear.PrefetchConfig` by the last component of a layer's path.
_PREFETCHED = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"}


class WithOp(LinearBase):
    """What the replacements of vLLM's linear layers have in common."""

    weight: Tensor
    bias: Any  # Parameter or None; vLLM says so only in some classes
    op: CustomLinearOp | None
    quant: QuantMethod | None = None
    next_to_prefetch: tuple[str, WithOp] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Choose the op, let vLLM build the layer as the op's shard, hand over."""
        shared = parallel.current()
        in_tree = next(kind for kind in type(self).__mro__ if not issubclass(kind, WithOp))
        given = signature(in_tree.__init__).bind(self, *args, **kwargs).arguments
        self.op = None
        self.next_to_prefetch = None
        if shared is None or given.get("tp_size") is not None:  # outside a worker, or the model cuts the weight itself
            super().__init__(*args, **kwargs)
            return
        chosen = self._choose(shared.env, given.get("prefix", ""), bool(given.get("disable_tp")))
        self.op = chosen.op
        with compat.shard_of(vllm_linear, chosen.tp_rank, chosen.tp_size):
            super().__init__(*args, **kwargs)
        self.hand_over()

    def _choose(self, env: LinearEnv, prefix: str, disable_tp: bool) -> Selected:
        raise NotImplementedError

    def hand_over(self, streamed: StreamedWeight | None = None) -> None:
        """Give weight, bias and flags to the op: at construction, and again when the weights are loaded and processed.

        Args:
            streamed: where the weight comes from under layer sharding.

        Raises:
            ValueError: flags with which the op cannot work.
        """
        if self.op is None:
            return
        unquantised = type(self.quant_method) is UnquantizedLinearMethod
        self.op.update_attrs(
            LinearParams(
                weight=self.weight if unquantised else next(self.parameters()),
                bias=self.bias,
                skip_bias_add=self.skip_bias_add,
                return_bias=self.return_bias,
                gather_output=getattr(self, "gather_output", False),
                input_is_parallel=getattr(self, "input_is_parallel", True),
                reduce_results=getattr(self, "reduce_results", True),
                gemm=torch.nn.functional.linear if unquantised else self._product,
                quant=self.quant,
                streamed=streamed,
            )
        )

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of a layer whose quantisation method is another one, which knows where its weights are."""
        product: Tensor = self.quant_method.apply(self, x, bias)
        return product

    def forward(self, input_: Tensor) -> Any:
        """The op's forward (`LinearResult`); vLLM's own where there is none."""
        if self.op is None:
            result: LinearResult = super().forward(input_)
        elif self.op.pads_input or self.op.cuts_output:
            result = _over_data_parallel(self.op, input_, parallel.step())
        else:
            result = self.op.apply(input_, parallel.step())
        if self.next_to_prefetch is not None:
            _prefetch(self.next_to_prefetch, result)
        return result


def _over_data_parallel(op: CustomLinearOp, input_: Tensor, state: StepState) -> LinearResult:
    """`op.apply` where the ranks of its group, which is along DP, have different numbers of tokens: all are padded to the largest."""
    shared = parallel.current()
    assert shared is not None  # the op came from it
    counts = shared.tokens_over(op.group, state)
    if state.flashcomm1 or counts is None or len(set(counts)) == 1:  # FlashComm1 has padded all replicas to one length
        return op.apply(input_, state)
    own, longest = counts[op.group.rank_in_group], max(counts)
    if op.pads_input:
        input_ = torch.nn.functional.pad(input_, (0, 0, 0, longest - own))
    result = op.apply(input_, replace(state, dp_tokens=None))
    if not op.cuts_output:
        return result
    return (result[0][:own], result[1]) if isinstance(result, tuple) else result[:own]


def _prefetch(following: tuple[str, WithOp], result: LinearResult) -> None:
    """Begin to prefetch the weight of the layer that follows, after what has just been computed."""
    shared = parallel.current()
    if shared is None or shared.prefetcher is None:
        return
    module, layer = following
    shared.prefetcher.finish()
    shared.prefetcher.start(module, layer.weight, result[0] if isinstance(result, tuple) else result)


class _Column(WithOp):
    def _choose(self, env: LinearEnv, prefix: str, disable_tp: bool) -> Selected:
        return select("column", prefix, env, disable_tp=disable_tp)


class AscendColumnParallelLinear(_Column, ColumnParallelLinear):
    """`ColumnParallelLinear` with an op."""


class AscendMergedColumnParallelLinear(_Column, MergedColumnParallelLinear):
    """`MergedColumnParallelLinear` with an op."""


class FusedProjection(Tensor):
    """Query, key and value side by side `[T, N*D + 2*Nkv*D]`, whose `split` and `chunk` along the last axis copy, in one kernel.

    The models split it at once, and every kernel that reads a part needs it contiguous: three views would be copied one by one.
    In all else it is a tensor as any other; what operators return of it is a plain one.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch.nn.Parameter does

    def split(self, split_size: Any, dim: int = 0) -> Any:
        """As `Tensor.split`; copies if `dim` is the last axis."""
        if dim not in (-1, self.dim() - 1):
            return super().split(split_size, dim)  # type: ignore[no-untyped-call]
        width = self.shape[-1]
        if isinstance(split_size, int):
            split_size = [min(split_size, width - start) for start in range(0, width, split_size)]
        return tuple(kernels.split_columns(self.as_subclass(Tensor), split_size))

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        """As `Tensor.chunk`; copies if `dim` is the last axis."""
        return self.split(-(-self.shape[dim] // chunks), dim)


class AscendQKVParallelLinear(_Column, QKVParallelLinear):
    """`QKVParallelLinear` with an op."""

    def forward(self, input_: Tensor) -> Any:
        """As `WithOp.forward`; the output is a `FusedProjection`."""
        result = super().forward(input_)
        if isinstance(result, tuple):
            return result[0].as_subclass(FusedProjection), *result[1:]
        return result.as_subclass(FusedProjection)


class AscendRowParallelLinear(WithOp, RowParallelLinear):
    """`RowParallelLinear` with an op."""

    def _choose(self, env: LinearEnv, prefix: str, disable_tp: bool) -> Selected:
        return select("row", prefix, env, disable_tp=disable_tp)


class AscendReplicatedLinear(WithOp, ReplicatedLinear):
    """`ReplicatedLinear` with an op."""

    def _choose(self, env: LinearEnv, prefix: str, disable_tp: bool) -> Selected:
        return Selected(get_replicated_op(prefix, env, disable_tp=disable_tp), env.tp.rank_in_group, env.tp.world_size)


def finish_loading(model: nn.Module) -> None:
    """Hand the loaded weights over, begin to stream those of layer sharding, and chain the weights that are prefetched.

    Collective where layer sharding is on.

    Raises:
        ValueError: a series of fewer than two layers to stream.
    """
    shared = parallel.current()
    if shared is None:
        return
    layers = [layer for layer in model.modules() if isinstance(layer, WithOp)]
    for layer in layers:
        layer.hand_over()
    if shared.env.o_shard is not None:
        _stream(layers, shared.env.o_shard)
    if shared.prefetcher is not None:
        _chain(layers)


def refuse_to_reload() -> None:
    """Raise ValueError where layer sharding is on: this rank does not hold all weights that would be loaded anew."""
    shared = parallel.current()
    if shared is not None and shared.env.o_shard is not None:
        raise ValueError(
            "weights cannot be loaded anew with layer_sharding (additional_config): the ranks hold the weights of different layers; "
            "restart with the new weights, or leave layer_sharding out"
        )


def _stream(layers: list[WithOp], o_shard: LayerShard) -> None:
    """Spread the weights of o_proj over ranks. On a short pipeline stage broadcasts start as early as they can."""
    series = [
        layer
        for layer in layers
        if layer.prefix.endswith(".o_proj") and layer.op is not None and layer.op.streams_weight
    ]
    for layer in series:
        index = layer_index(layer.prefix)
        if index is not None:
            layer.hand_over(o_shard.add(index, layer.weight))
    o_shard.prefetch_step = min(o_shard.prefetch_step, max(len(series) - 2, 0))
    o_shard.start()


def _chain(layers: list[WithOp]) -> None:
    """Tell each layer of the language model which one follows it, if its weight is prefetched; the first one follows the last."""
    found = [
        (module, layer)
        for layer in layers
        if (module := _PREFETCHED.get(layer.prefix.rpartition(".")[2]))
        and layer_index(layer.prefix) is not None
        and not in_tower(layer.prefix)
        and isinstance(getattr(layer, "weight", None), Tensor)  # a quantised layer may have no single one
    ]
    for (_, layer), following in zip(found, [*found[1:], *found[:1]], strict=True):
        layer.next_to_prefetch = following  # in a tuple, or nn.Module would take it for a part of this layer


def register() -> None:
    """Replace vLLM's layers, each under its own name."""
    replacements: list[tuple[Callable[..., Any], type[WithOp]]] = [
        (ColumnParallelLinear.register_oot, AscendColumnParallelLinear),
        (MergedColumnParallelLinear.register_oot, AscendMergedColumnParallelLinear),
        (QKVParallelLinear.register_oot, AscendQKVParallelLinear),
        (RowParallelLinear.register_oot, AscendRowParallelLinear),
        (ReplicatedLinear.register_oot, AscendReplicatedLinear),
    ]
    for register_oot, replacement in replacements:
        register_oot(replacement)
