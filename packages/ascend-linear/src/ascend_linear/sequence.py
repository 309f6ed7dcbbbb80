# SPDX-License-Identifier: Apache-2.0
"""FlashComm1: between the layers each TP rank holds a chunk of the tokens instead of a copy of all.

An all-reduce after a row layer becomes a reduce-scatter there and an all-gather before the next column layer; what lies
between (norms, residuals) runs on 1/TP of the tokens. N: tokens of the TP group, P: N with `StepState.pad_size` rows of
padding.
"""

import torch
from torch import Tensor

from ascend_linear import kernels
from ascend_linear.cost import Cost, LayerSize, all_gather_bytes, reduce_scatter_bytes
from ascend_linear.op import CustomColumnParallelOp, CustomRowParallelOp
from ascend_linear.quant import W8A8Static
from ascend_linear.state import LinearEnv, StepState

__all__ = ["SequenceColumnParallelOp", "SequenceRowParallelOp", "gather_cost", "gather_tokens"]


def gather_tokens(op: CustomColumnParallelOp, input_: Tensor, state: StepState) -> Tensor:
    """``[P / TP, in] -> [N, in]`` over the op's group; `input_` itself where FlashComm1 is not active."""
    if not state.flashcomm1:
        return input_
    op.check_tokens_by_features(input_)
    gathered = op.group.all_gather(input_, 0)
    if gathered.shape[0] < state.pad_size:
        raise ValueError(f"pad_size={state.pad_size}: {op!r} gathered only {gathered.shape[0]} rows")
    return gathered[: gathered.shape[0] - state.pad_size]


def gather_cost(op: CustomColumnParallelOp, layer: LayerSize, flashcomm1: bool) -> Cost:
    """Of `gather_tokens` and the product."""
    if not flashcomm1:
        return Cost()
    tp = op.group.world_size
    return Cost(bytes_per_token=all_gather_bytes(layer.input_bytes / tp, tp), launches=2)


class SequenceColumnParallelOp(CustomColumnParallelOp):
    """``[P / TP, in]`` -> all-gather of tokens, padding dropped -> ``[N, in]`` -> product -> ``[N, out / TP]``.

    Where FlashComm1 is not active: ``[N, in] -> [N, out / TP]``.
    """

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """All-gather of tokens where FlashComm1 is active, then the product."""
        return self.gather_features(self.gemm(gather_tokens(self, input_, state)))

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The all-gather of tokens where FlashComm1 is active, and the product."""
        return gather_cost(self, layer, flashcomm1)


class SequenceRowParallelOp(CustomRowParallelOp):
    """``[N, in / TP]`` -> padding -> product -> reduce-scatter of tokens -> ``[P / TP, out]``.

    Where FlashComm1 is not active: all-reduce, ``[N, in / TP] -> [N, out]``. Product and reduce-scatter are one kernel
    under `enable_matmul_reduce_scatter`, for layers that are not quantised or W8A8 with a static scale.

    Args:
        env: groups and options.
        prefix: the layer's path in the model. An `o_proj` under `enable_dsa_cp` gets its input padded:
            ``[P, in / TP]``.
    """

    must_reduce = True

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Store the arguments, and whether the input still has to be padded."""
        super().__init__(env, prefix=prefix)
        self._pads = not (env.enable_dsa_cp and prefix.rpartition(".")[2] == "o_proj")

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """Product, then reduce-scatter of tokens where FlashComm1 is active, else all-reduce."""
        if not state.flashcomm1:
            return super().forward(input_, state)
        self.check_tokens_by_features(input_)
        input_ = self.own_features(input_, self.group)
        if self._pads and state.pad_size:
            input_ = torch.nn.functional.pad(input_, (0, 0, 0, state.pad_size))
        if input_.shape[0] % self.tp_size:
            raise ValueError(
                f"pad_size={state.pad_size}: {self!r} has {input_.shape[0]} rows with it, "
                f"must be a multiple of {self.tp_size} ranks"
            )
        return self._reduce_scattered_product(input_)

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The product and the reduce-scatter, in one kernel under `enable_matmul_reduce_scatter`; without FlashComm1 as the base."""
        if not flashcomm1:
            return super().cost(layer)
        launches = 1 if self.env.enable_matmul_reduce_scatter else 2
        return Cost(bytes_per_token=reduce_scatter_bytes(layer.output_bytes, self.tp_size), launches=launches)

    def _reduce_scattered_product(self, input_: Tensor) -> Tensor:
        """``[P, in / TP] -> [P / TP, out]``. The fused kernel takes no bias: every rank adds it to its own rows."""
        params = self.params
        fused = self.env.enable_matmul_reduce_scatter and input_.numel() > 0
        if fused and isinstance(params.quant, W8A8Static):
            output = params.quant.reduce_scattered_product(input_, self.weight(), self.comm_name(), self.tp_size)
        elif fused and params.is_plain:
            weight = self.weight().t()
            output = kernels.mm_reduce_scatter(input_.contiguous(), weight, self.comm_name(), self.tp_size)
        else:
            return self.group.reduce_scatter(self.partial_product(input_), 0)
        return output if params.bias is None or params.skip_bias_add else output + params.bias
