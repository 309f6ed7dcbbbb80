# SPDX-License-Identifier: Apache-2.0
"""Product and all-reduce in one kernel, which overlaps the two."""

from dataclasses import replace

from torch import Tensor

from ascend_linear import kernels
from ascend_linear.cost import Cost, LayerSize
from ascend_linear.op import CustomRowParallelOp
from ascend_linear.state import StepState

__all__ = ["MatmulAllreduceRowParallelOp"]


class MatmulAllreduceRowParallelOp(CustomRowParallelOp):
    """``[..., in / TP] -> [..., out]`` like its base, one kernel for the product and the sum.

    Where there is nothing to fuse it is its base: `reduce_results` is False, one rank, no tokens, or a product that is
    not the plain one (`LinearParams.gemm`, `LinearParams.quant`). So it is in a decoding step (`StepState.prefill` is False): the kernel is
    documented for prompts alone. Needs a group over HCCL and torch_npu.
    """

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """Product and all-reduce in one kernel, or as in the base class."""
        params = self.params
        if (
            not (state.prefill and params.reduce_results and self.tp_size > 1 and params.is_plain)
            or input_.numel() == 0
        ):
            return super().forward(input_, state)
        features = self.own_features(input_, self.group).contiguous()
        bias = params.bias if self.tp_rank == 0 and not params.skip_bias_add else None
        output = kernels.mm_all_reduce(
            features.view(-1, features.shape[-1]), self.weight().t(), self.comm_name(), bias=bias
        )
        return output.view(*features.shape[:-1], output.shape[-1])

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The base's bytes in one kernel, as in a step with prompts."""
        return replace(super().cost(layer), launches=1)
