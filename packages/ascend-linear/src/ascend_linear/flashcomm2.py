# SPDX-License-Identifier: Apache-2.0
"""FlashComm2: o_proj on exchanged tokens and heads instead of on a slice of heads and an all-reduce.

The TP group is a grid of k x G ranks, G = TP / k: rank ``j * G + i`` has index i in its ODP block (G consecutive ranks)
and j in its OTP group (k ranks, G apart). ODP exchanges tokens for heads, OTP shares the weight. With k = 1 there is no
OTP and the weight is whole.

With layer sharding (o-shard) the o_proj of most layers is on other ranks: the layer's qkv projection starts to stream
it, and attention hides the transfer.
"""

import torch
from ascend_comm import Solo
from torch import Tensor

from ascend_linear.cost import Cost, LayerSize, all_gather_bytes, all_to_all_bytes, reduce_scatter_bytes
from ascend_linear.op import CustomColumnParallelOp, CustomRowParallelOp, own_rank
from ascend_linear.quant import W8A8Static
from ascend_linear.sequence import gather_cost, gather_tokens
from ascend_linear.state import LinearEnv, StepState, layer_index

__all__ = ["Flashcomm2OProjRowParallelOp", "Flashcomm2OshardQKVParallelOp"]


class Flashcomm2OshardQKVParallelOp(CustomColumnParallelOp):
    """Starts the broadcast that brings an o_proj weight of `env.o_shard`, then computes as `SequenceColumnParallelOp`.

    ``[N, in] -> [N, out / TP]``, under FlashComm1 ``[P / TP, in] -> [N, out / TP]``. The broadcast is that of the layer
    ``prefetch_step`` after this one. A layer whose o_proj is not in the series starts none.

    Args:
        env: groups and options, `o_shard` among them.
        prefix: the layer's path in the model, with ``layers.<n>`` in it.

    Raises:
        ValueError: `env` has no `o_shard`, or `prefix` no layer index.
    """

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Take the series of o_proj weights from `env`, and the layer's index from `prefix`."""
        super().__init__(env, prefix=prefix)
        if env.o_shard is None:
            raise ValueError("env.o_shard=None: Flashcomm2OshardQKVParallelOp needs the series of o_proj")
        layer = layer_index(prefix)
        if layer is None:
            raise ValueError(f"prefix={prefix!r}: Flashcomm2OshardQKVParallelOp needs 'layers.<n>' in it")
        self.layer = layer
        self.o_shard = env.o_shard

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """Gather the tokens, start the broadcast of the o_proj weight that is due after this layer, then the product."""
        input_ = gather_tokens(self, input_, state)
        if self.layer in self.o_shard:
            self.o_shard.reach(self.layer)
        return self.gather_features(self.gemm(input_))

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The all-gather of tokens where FlashComm1 is active, and the product. The broadcast is a cost of the o_proj that it brings."""
        return gather_cost(self, layer, flashcomm1)


class Flashcomm2OProjRowParallelOp(CustomRowParallelOp):
    """``[N, in / TP]`` -> all-to-all ODP -> ``[P / G, in / k]`` -> product -> reduce-scatter OTP -> ``[P / TP, out]``.

    Each rank ends with the token chunk of its own TP index. Where FlashComm1 is not active an all-gather over TP
    follows: ``[N, out]``. N: tokens of the TP group; P: N padded to a multiple of TP, by `StepState.pad_size` where
    FlashComm1 is active. The weight is cut into k shards over OTP. A W8A8 layer with a static scale quantises before the
    exchange, which then has half the bytes; one with a scale for each token after it, since a token's features come
    from many ranks.

    Args:
        env: groups and options, `flashcomm2_odp` among them.
        prefix: the layer's path in the model.

    Raises:
        ValueError: `env` has no `flashcomm2_odp`.
    """

    must_reduce = True
    streams_weight = True

    def __init__(self, env: LinearEnv, *, prefix: str = "") -> None:
        """Take the two groups of FlashComm2 from `env`."""
        if env.flashcomm2_odp is None:
            raise ValueError("env.flashcomm2_odp=None: Flashcomm2OProjRowParallelOp needs this group")
        otp = Solo(own_rank(env)) if env.flashcomm2_otp is None else env.flashcomm2_otp
        super().__init__(env, group=otp, prefix=prefix)
        self.odp = env.flashcomm2_odp

    def forward(self, input_: Tensor, state: StepState) -> Tensor:
        """All-to-all over ODP, product, reduce-scatter over OTP; then an all-gather over TP where FlashComm1 is not active."""
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
        if isinstance(self.params.quant, W8A8Static) and input_.numel():
            input_ = self.params.quant.quantise(input_)
        if pad_size:
            input_ = torch.nn.functional.pad(input_, (0, 0, 0, pad_size))
        output = self.partial_product(self._exchange(input_))
        if self.tp_size > 1:
            output = self.group.reduce_scatter(output, 0)
        return output if state.flashcomm1 else tp.all_gather(output, 0)[:tokens]

    def cost(self, layer: LayerSize, *, flashcomm1: bool = False) -> Cost:
        """The all-to-all, the product and the reduce-scatter; the all-gather without FlashComm1; the broadcast under layer sharding."""
        tp, g, k = self.env.tp.world_size, self.odp.world_size, self.tp_size
        sent = all_to_all_bytes(layer.input_bytes / tp, g) + reduce_scatter_bytes(layer.output_bytes / g, k)
        if not flashcomm1:
            sent += all_gather_bytes(layer.output_bytes / tp, tp)
        sharers = 1 if self.env.o_shard is None else self.env.o_shard.group.world_size
        launches = 2 + (k > 1) + (not flashcomm1) + (sharers > 1)
        return Cost(bytes_per_token=sent, launches=launches, weight_ranks=sharers)

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
