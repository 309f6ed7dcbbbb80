# SPDX-License-Identifier: Apache-2.0
"""Context parallelism of DeepSeek sparse attention: each rank attends to a part of the context with whole weights.

The group is of size 1. Where layer sharding spreads the weights over ranks, `LinearParams.streamed` brings them; the
attention layer starts the broadcasts (`LayerShard.reach`). vllm-ascend does not use this module: it has no sparse attention.
"""

from dataclasses import replace

from ascend_comm import Solo

from ascend_linear.op import CustomColumnParallelOp, CustomRowParallelOp, LinearParams, own_rank
from ascend_linear.state import LinearEnv

__all__ = ["ShardedCPColumnParallelOp", "ShardedCPRowParallelOp"]


class ShardedCPColumnParallelOp(CustomColumnParallelOp):
    """``[..., in] -> [..., out]`` with the whole weight, without communication."""

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Store the arguments; the group has this rank alone."""
        super().__init__(env, group=Solo(own_rank(env)), prefix=prefix)


class ShardedCPRowParallelOp(CustomRowParallelOp):
    """``[..., in] -> [..., out]`` with the whole weight, without communication: `reduce_results` is always False."""

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Store the arguments; the group has this rank alone."""
        super().__init__(env, group=Solo(own_rank(env)), prefix=prefix)

    def update_attrs(self, params: LinearParams) -> None:
        """See `CustomLinearOp.update_attrs`."""
        super().update_attrs(replace(params, reduce_results=False))
