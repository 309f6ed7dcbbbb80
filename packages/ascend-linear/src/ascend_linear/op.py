# SPDX-License-Identifier: Apache-2.0
"""The tree of linear ops. An op is a communication group, which also cuts the weight, and a layer's forward over it.

A layer asks `ascend_linear.get_parallel_op` for its op, creates and loads its weight as shard `tp_rank` of `tp_size`,
hands it over with `update_attrs`, and calls `apply`. To add an op: subclass `CustomColumnParallelOp` or
`CustomRowParallelOp`, give it its group, override `forward`, and add a rule to `select.py` (docs/add-an-op.md).

In shapes: n tokens of this rank, k ranks of the op's group, in/out the whole layer's features. Weights are ``[out,
in]``; column ops cut `out`, row ops cut `in`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from ascend_comm import CommGroup, Solo
from torch import Tensor

from ascend_linear.cost import Cost, LayerSize, all_reduce_bytes
from ascend_linear.layer_shard import StreamedWeight
from ascend_linear.quant import QuantMethod
from ascend_linear.state import LinearEnv, StepState

__all__ = [
    "CustomColumnParallelOp",
    "CustomLinearOp",
    "CustomReplicatedOp",
    "CustomRowParallelOp",
    "Gemm",
    "LinearParams",
    "LinearResult",
]

Gemm = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``gemm(x [n, in], weight, bias) -> [n, out]``, the product on this rank."""

LinearResult = Tensor | tuple[Tensor, Tensor | None]
"""The output, or with `return_bias` the pair (output, bias that was not added)."""

_FLASHCOMM1_OFF = StepState()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearParams:
    """What a layer hands to its op. The tensors are kept, not copied; after replacing one, call `update_attrs` again.

    Args:
        weight: this rank's shard, ``[out / k, in]`` for column ops, ``[out, in / k]`` for row ops, ``[out, in]``
            replicated.
        bias: ``[out / k]`` for column ops, the whole ``[out]`` for row ops and replicated ones.
        skip_bias_add: do not add the bias, but return it.
        return_bias: return (output, bias or None) instead of the output alone.
        gather_output: column ops: gather the output's features over the group.
        input_is_parallel: row ops: the input holds this rank's features only. False: it holds all, and the op cuts its
            own out.
        reduce_results: row ops: sum over the group. False: the output is this rank's part of the sum.
        gemm: the product on this rank.
        quant: the product of a quantised layer, instead of `gemm`.
        streamed: where the weight comes from under layer sharding, instead of `weight`.
    """

    weight: Tensor
    bias: Tensor | None = None
    skip_bias_add: bool = False
    return_bias: bool = True
    gather_output: bool = False
    input_is_parallel: bool = True
    reduce_results: bool = True
    gemm: Gemm = torch.nn.functional.linear
    quant: QuantMethod | None = None
    streamed: StreamedWeight | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the product is ``x @ weight.T + bias``, which fused kernels compute too."""
        return self.quant is None and self.gemm is torch.nn.functional.linear


class CustomLinearOp:
    """Base of all ops.

    Args:
        env: groups and options.
        group: the group whose ranks share the weight.
        prefix: the layer's path in the model, for messages.

    Attributes:
        pads_input: the group is along DP, and the input has this rank's own tokens, of which all ranks of the group must have equally many:
            a caller whose ranks have different counts pads them to the largest.
        cuts_output: the same of the output: the caller drops the rows of the padding.
        streams_weight: the op can compute with a weight that layer sharding brings (`LinearParams.streamed`).
    """

    pads_input: ClassVar[bool] = False
    cuts_output: ClassVar[bool] = False
    streams_weight: ClassVar[bool] = False

    def __init__(self, env: LinearEnv, *, group: CommGroup, prefix: str = "") -> None:
        """Store the arguments. The weight is set by `update_attrs`."""
        self.env = env
        self.group = group
        self.prefix = prefix
        self._params: LinearParams | None = None
        self._comm_name: str | None = None

    def __repr__(self) -> str:
        """Class, layer and ranks."""
        return f"{type(self).__name__}(prefix={self.prefix!r}, ranks={list(self.group.ranks)})"

    @property
    def tp_rank(self) -> int:
        """Which shard of the weight this rank holds."""
        return self.group.rank_in_group

    @property
    def tp_size(self) -> int:
        """Into how many shards the weight is cut."""
        return self.group.world_size

    @property
    def params(self) -> LinearParams:
        """What the layer handed over.

        Raises:
            RuntimeError: `update_attrs` has not been called.
        """
        if self._params is None:
            raise RuntimeError(f"{self!r} has no weight yet: call update_attrs before apply")
        return self._params

    def update_attrs(self, params: LinearParams) -> None:
        """Take weight, bias and flags of the layer, after its construction and whenever one of them is replaced.

        Raises:
            ValueError: flags with which this op cannot work.
        """
        self._params = params

    def apply(self, input_: Tensor, state: StepState | None = None) -> LinearResult:
        """The layer's forward.

        Args:
            input_: shape as the op's class says.
            state: this step's flags; None: FlashComm1 is not active.

        Returns:
            The output or (output, bias), see `LinearParams.return_bias`. The bias is None unless `skip_bias_add`.

        Raises:
            ValueError: an input whose shape does not fit the group or the state.
            RuntimeError: `update_attrs` has not been called.
        """
        params = self.params
        output = self.forward(input_, _FLASHCOMM1_OFF if state is None else state)
        if not params.return_bias:
            return output
        return output, params.bias if params.skip_bias_add else None

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """Communication and product, without the bias that is returned. This is what ops override."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """What `forward` costs for a layer of this size; ops that communicate override it.

        Args:
            layer: the whole layer.
            flashcomm1: whether FlashComm1 is active in the step.
        """
        return Cost()

    def gemm(self, input_: Tensor, *, add_bias: bool = True) -> Tensor:
        """The product on this rank, with the bias unless `add_bias` is False or the layer skips it."""
        params = self.params
        bias = params.bias if add_bias and not params.skip_bias_add else None
        if params.quant is not None:
            return params.quant.product(input_, self.weight(), bias, once=add_bias)
        return params.gemm(input_, self.weight(), bias)

    def weight(self) -> Tensor:
        """The weight to compute with: the layer's own, or the one streamed to this rank."""
        params = self.params
        return params.weight if params.streamed is None else params.streamed.get()

    def comm_name(self) -> str:
        """The HCCL communicator's name of the op's group, for fused kernels. RuntimeError where there is none."""
        if self._comm_name is None:
            self._comm_name = self.group.comm_name()
        return self._comm_name

    def check_tokens_by_features(self, input_: Tensor) -> None:
        """Raise ValueError unless `input_` is ``[tokens, features]``."""
        if input_.dim() != 2:
            raise ValueError(f"{self!r}: input_ of shape {tuple(input_.shape)} must be [tokens, features]")

    def check_equal_tokens(self, state: StepState) -> None:
        """Raise ValueError where the DP ranks of this op's group are known to differ in their token counts.

        The group must be of consecutive DP ranks. Under FlashComm1 all DP ranks are padded to one length.
        """
        if state.dp_tokens is None or state.flashcomm1:
            return
        first = self.env.dp_rank - self.group.rank_in_group
        counts = state.dp_tokens[first : first + self.group.world_size]
        if len(set(counts)) > 1:
            raise ValueError(
                f"dp_tokens={state.dp_tokens}: {self!r} needs equal counts on its ranks, got {counts}; pad them"
            )


class CustomColumnParallelOp(CustomLinearOp):
    """Output features cut over the group; every rank has the whole input.

    ``[..., in] -> [..., out / k]``, or ``[..., out]`` with `gather_output`.

    Args:
        env: groups and options.
        group: None: `env.tp`.
        prefix: the layer's path in the model.
    """

    def __init__(self, env: LinearEnv, *, group: CommGroup | None = None, prefix: str = "") -> None:
        """Store the arguments."""
        super().__init__(env, group=env.tp if group is None else group, prefix=prefix)

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """Product, then the gather where it is asked for."""
        return self.gather_features(self.gemm(input_))

    def gather_features(self, output: Tensor) -> Tensor:
        """``[..., out / k] -> [..., out]`` where the layer has `gather_output`, else `output`."""
        return self.group.all_gather(output, -1) if self.params.gather_output and self.tp_size > 1 else output


class CustomRowParallelOp(CustomLinearOp):
    """Input features cut over the group; the ranks' products are summed. The bias is added on group rank 0 only.

    ``[..., in / k] -> [..., out]``, the same on all ranks.

    Args:
        env: groups and options.
        group: None: `env.tp`.
        prefix: the layer's path in the model.
    """

    must_reduce = False
    """Whether the op's output has no form without the sum, so that `reduce_results` must be True."""

    def __init__(self, env: LinearEnv, *, group: CommGroup | None = None, prefix: str = "") -> None:
        """Store the arguments."""
        super().__init__(env, group=env.tp if group is None else group, prefix=prefix)

    def update_attrs(self, params: LinearParams) -> None:
        """See `CustomLinearOp.update_attrs`."""
        if self.must_reduce and not params.reduce_results:
            raise ValueError(
                f"reduce_results=False: {self!r} sums over its group to give its output its shape; it must be True"
            )
        super().update_attrs(params)

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """Product, then the sum where it is asked for."""
        output = self.partial_product(self.own_features(input_, self.group))
        return self.group.all_reduce(output) if self.params.reduce_results and self.tp_size > 1 else output

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The product, then the all-reduce, unless the model reduces later."""
        if self.tp_size == 1 or layer.reduced_later:
            return Cost()
        return Cost(bytes_per_token=all_reduce_bytes(layer.output_bytes, self.tp_size), launches=2)

    def own_features(self, input_: Tensor, group: CommGroup) -> Tensor:
        """This rank's slice of the last axis over `group`, where the layer's input is not parallel yet.

        Raises:
            ValueError: features that the group does not divide.
        """
        if self.params.input_is_parallel or group.world_size == 1:
            return input_
        width, rest = divmod(input_.shape[-1], group.world_size)
        if rest:
            raise ValueError(
                f"{self!r}: input_ has {input_.shape[-1]} features, must be a multiple of {group.world_size} ranks"
            )
        return input_.narrow(-1, group.rank_in_group * width, width)

    def partial_product(self, input_: Tensor) -> Tensor:
        """The product on this rank, whose sum over the group has the bias once."""
        return self.gemm(input_, add_bias=self.tp_rank == 0)


class CustomReplicatedOp(CustomLinearOp):
    """The whole weight on every rank, no communication: ``[..., in] -> [..., out]``.

    Args:
        env: groups and options.
        prefix: the layer's path in the model.
    """

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Store the arguments; the group has this rank alone."""
        super().__init__(env, group=Solo(own_rank(env)), prefix=prefix)

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """The product."""
        return self.gemm(input_)


def own_rank(env: LinearEnv) -> int:
    """The global rank of this process."""
    return env.tp.ranks[env.tp.rank_in_group]
