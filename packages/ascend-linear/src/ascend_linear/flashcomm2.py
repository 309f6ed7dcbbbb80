# SPDX-License-Identifier: Apache-2.0
"""FlashComm2: o_proj on exchanged tokens and heads instead of on a slice of heads and an all-reduce.

The TP group is a grid of k x G ranks, G = TP / k: rank ``j * G + i`` has index i in its ODP block (G consecutive ranks)
and j in its OTP group (k ranks, G apart). ODP exchanges tokens for heads, OTP shares the weight. With k = 1 there is no
OTP and the weight is whole.
"""

import torch
from ascend_comm import Solo
from torch import Tensor

from ascend_linear.op import CustomRowParallelOp, own_rank
from ascend_linear.state import LinearEnv, StepState

__all__ = ["Flashcomm2OProjRowParallelOp"]


class Flashcomm2OProjRowParallelOp(CustomRowParallelOp):
    """``[N, in / TP]`` -> all-to-all ODP -> ``[P / G, in / k]`` -> product -> reduce-scatter OTP -> ``[P / TP, out]``.

    Each rank ends with the token chunk of its own TP index. Where FlashComm1 is not active an all-gather over TP
    follows: ``[N, out]``. N: tokens of the TP group; P: N padded to a multiple of TP, by `StepState.pad_size` where
    FlashComm1 is active. The weight is cut into k shards over OTP.

    Args:
        env: groups and options, `flashcomm2_odp` among them.
        prefix: the layer's path in the model.

    Raises:
        ValueError: `env` has no `flashcomm2_odp`.
    """

    must_reduce = True

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """As above."""
        if env.flashcomm2_odp is None:
            raise ValueError("env.flashcomm2_odp=None: Flashcomm2OProjRowParallelOp needs this group")
        otp = Solo(own_rank(env)) if env.flashcomm2_otp is None else env.flashcomm2_otp
        super().__init__(env, group=otp, prefix=prefix)
        self.odp = env.flashcomm2_odp

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """As above."""
        self.check_tokens_by_features(input_)
        tp = self.env.tp
        input_ = self.own_features(input_, tp)
        tokens = input_.shape[0]
        pad_size = state.pad_size if state.flashcomm1 else -tokens % tp.world_size
        if (tokens + pad_size) % tp.world_size:
            raise ValueError(
                f"pad_size={pad_size}: {self!r} has {tokens + pad_size} rows with it, "
                f"must be a multiple of {tp.world_size} ranks"
            )
        if pad_size:
            input_ = torch.nn.functional.pad(input_, (0, 0, 0, pad_size))
        output = self.partial_product(self._exchange(input_))
        if self.tp_size > 1:
            output = self.group.reduce_scatter(output, 0)
        return output if state.flashcomm1 else tp.all_gather(output, 0)[:tokens]

    def _exchange(self, input_: Tensor) -> Tensor:
        """Tokens for heads over ODP: ``[P, w] -> [P / G, G * w]``.

        Peer i gets the token chunks ``i, i + G, ...``, k of them (`Topology.flashcomm2_token_order`), so that the
        reduce-scatter over OTP leaves chunk ``i + j * G`` on rank ``i + j * G``.
        """
        rows, width = input_.shape
        k, g = self.tp_size, self.odp.world_size
        by_peer = input_.view(k, g, rows // (k * g), width).transpose(0, 1).reshape(rows, width)
        received = self.odp.all_to_all(by_peer)
        return received.view(g, rows // g, width).transpose(0, 1).reshape(rows // g, g * width)
