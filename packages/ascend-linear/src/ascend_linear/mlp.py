# SPDX-License-Identifier: Apache-2.0
"""mlp-TP: k DP ranks share the dense MLPs. Tokens are gathered before the first layer, scattered after the second.

n: tokens of this rank, equal on all k ranks of the group. A rank's tokens stand at ``[rank * n : (rank + 1) * n]`` in
between.
"""

from torch import Tensor

from ascend_linear.cost import Cost, LayerSize, all_gather_bytes, reduce_scatter_bytes
from ascend_linear.op import CustomColumnParallelOp, CustomRowParallelOp
from ascend_linear.state import LinearEnv, StepState

__all__ = ["MLPColumnParallelOp", "MLPRowParallelOp"]


class MLPColumnParallelOp(CustomColumnParallelOp):
    """``[n, in]`` -> all-gather of tokens -> ``[k * n, in]`` -> product -> ``[k * n, out / k]``.

    Args:
        env: groups and options, `mlp_tp` among them.
        prefix: the layer's path in the model.

    Raises:
        ValueError: `env` has no `mlp_tp`.
    """

    pads_input = True

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Take `mlp_tp` from `env`."""
        if env.mlp_tp is None:
            raise ValueError("env.mlp_tp=None: MLPColumnParallelOp needs this group")
        super().__init__(env, group=env.mlp_tp, prefix=prefix)

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """All-gather of tokens over `mlp_tp`, then the product."""
        self.check_tokens_by_features(input_)
        self.check_equal_tokens(state)
        return self.gather_features(self.gemm(self.group.all_gather(input_, 0)))

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The all-gather of tokens, of which a rank has its chunk alone under FlashComm1, and the product."""
        own = layer.input_bytes / (self.env.tp.world_size if flashcomm1 else 1)
        return Cost(bytes_per_token=all_gather_bytes(own, self.tp_size), launches=2 if self.tp_size > 1 else 1)


class MLPRowParallelOp(CustomRowParallelOp):
    """``[k * n, in / k]`` -> product -> reduce-scatter of tokens -> ``[n, out]``.

    Args:
        env: groups and options, `mlp_tp` among them.
        prefix: the layer's path in the model.

    Raises:
        ValueError: `env` has no `mlp_tp`.
    """

    must_reduce = True
    cuts_output = True

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Take `mlp_tp` from `env`."""
        if env.mlp_tp is None:
            raise ValueError("env.mlp_tp=None: MLPRowParallelOp needs this group")
        super().__init__(env, group=env.mlp_tp, prefix=prefix)

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """Product, then reduce-scatter of tokens over `mlp_tp`."""
        self.check_tokens_by_features(input_)
        if input_.shape[0] % self.tp_size:
            raise ValueError(
                f"{self!r}: input_ has {input_.shape[0]} tokens, must be {self.tp_size} times those of a rank"
            )
        self.check_equal_tokens(state)
        return self.group.reduce_scatter(self.partial_product(self.own_features(input_, self.group)), 0)

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The product and the reduce-scatter of all ranks' tokens."""
        tokens = self.tp_size / (self.env.tp.world_size if flashcomm1 else 1)
        sent = reduce_scatter_bytes(tokens * layer.output_bytes, self.tp_size)
        return Cost(bytes_per_token=sent, launches=2 if self.tp_size > 1 else 1)
