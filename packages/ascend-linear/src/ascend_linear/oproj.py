# SPDX-License-Identifier: Apache-2.0
"""oproj-TP: k data parallel ranks share o_proj, each attending to its own requests with all heads."""

from torch import Tensor

from ascend_linear.cost import Cost, LayerSize, all_to_all_bytes, reduce_scatter_bytes
from ascend_linear.op import CustomRowParallelOp
from ascend_linear.state import LinearEnv, StepState

__all__ = ["OProjRowParallelOp"]


class OProjRowParallelOp(CustomRowParallelOp):
    """``[n, in]`` -> all-to-all -> ``[k * n, in / k]`` -> product -> reduce-scatter of tokens -> ``[n, out]``.

    n: tokens of this rank, equal on all k ranks of the group. TP is 1, so the input always has all features.

    Args:
        env: groups and options, `otp` among them.
        prefix: the layer's path in the model.

    Raises:
        ValueError: `env` has no `otp`.
    """

    must_reduce = True
    pads_input = True
    cuts_output = True

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Take `otp` from `env`."""
        if env.otp is None:
            raise ValueError("env.otp=None: OProjRowParallelOp needs this group")
        super().__init__(env, group=env.otp, prefix=prefix)

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """Exchange features for tokens over `otp`, multiply, then reduce-scatter of tokens."""
        self.check_tokens_by_features(input_)
        tokens, features = input_.shape
        if features % self.tp_size:
            raise ValueError(f"{self!r}: input_ has {features} features, must be a multiple of {self.tp_size} ranks")
        self.check_equal_tokens(state)
        width = features // self.tp_size
        by_rank = input_.view(tokens, self.tp_size, width).transpose(0, 1).reshape(self.tp_size * tokens, width)
        return self.group.reduce_scatter(self.partial_product(self.group.all_to_all(by_rank)), 0)

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The all-to-all, the product, and the reduce-scatter of all ranks' tokens."""
        k = self.tp_size
        sent = all_to_all_bytes(layer.input_bytes, k) + reduce_scatter_bytes(k * layer.output_bytes, k)
        return Cost(bytes_per_token=sent, launches=3 if k > 1 else 1)
