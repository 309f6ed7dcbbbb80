# SPDX-License-Identifier: Apache-2.0
"""What an op says that it costs, against the collectives that its forward starts."""

import ascend_linear as al
import pytest
import torch
from ascend_comm import Solo
from ascend_linear.cost import all_gather_bytes, all_reduce_bytes, all_to_all_bytes, reduce_scatter_bytes

TOKENS, INPUTS, OUTPUTS = 8, 32, 16


class Recording(Solo):
    """A group whose collectives give tensors of the right shape, and note what this rank would send."""

    def __init__(self, world_size, sent):
        super().__init__()
        self.world_size, self.ranks, self.sent = world_size, list(range(world_size)), sent

    def note(self, cost_of, x):
        if self.world_size > 1:
            self.sent.append(cost_of(x.numel() * x.element_size(), self.world_size))

    def all_gather(self, input_, dim=-1):
        self.note(all_gather_bytes, input_)
        return torch.cat([input_] * self.world_size, dim)

    def reduce_scatter(self, input_, dim=-1):
        self.note(reduce_scatter_bytes, input_)
        return input_.chunk(self.world_size, dim)[0]

    def all_reduce(self, input_):
        self.note(all_reduce_bytes, input_)
        return input_

    def all_to_all(self, input_, output_splits=None, input_splits=None):
        self.note(all_to_all_bytes, input_)
        return input_


# op, sizes of the groups of its LinearEnv, whether FlashComm1 is active
CASES = [
    (al.CustomReplicatedOp, {"tp": 4}, False),
    (al.CustomColumnParallelOp, {"tp": 4}, False),
    (al.CustomRowParallelOp, {"tp": 4}, False),
    (al.CustomRowParallelOp, {"tp": 1}, False),
    (al.SequenceColumnParallelOp, {"tp": 4}, True),
    (al.SequenceColumnParallelOp, {"tp": 4}, False),
    (al.SequenceRowParallelOp, {"tp": 4}, True),
    (al.SequenceRowParallelOp, {"tp": 4}, False),
    (al.MLPColumnParallelOp, {"tp": 1, "mlp_tp": 2}, False),
    (al.MLPColumnParallelOp, {"tp": 4, "mlp_tp": 2}, True),
    (al.MLPRowParallelOp, {"tp": 1, "mlp_tp": 2}, False),
    (al.MLPRowParallelOp, {"tp": 4, "mlp_tp": 2}, True),
    (al.OProjRowParallelOp, {"tp": 1, "otp": 4}, False),
    (al.Flashcomm2OProjRowParallelOp, {"tp": 4, "flashcomm2_odp": 2, "flashcomm2_otp": 2}, False),
    (al.Flashcomm2OProjRowParallelOp, {"tp": 4, "flashcomm2_odp": 2, "flashcomm2_otp": 2}, True),
    (al.Flashcomm2OProjRowParallelOp, {"tp": 4, "flashcomm2_odp": 4}, True),
    (al.ShardedCPColumnParallelOp, {"tp": 4}, False),
    (al.ShardedCPRowParallelOp, {"tp": 4}, False),
]


@pytest.mark.parametrize(("kind", "sizes", "flashcomm1"), CASES)
def test_an_op_costs_what_it_starts(kind, sizes, flashcomm1):
    sent, products = [], []
    groups = {name: Recording(size, sent) for name, size in sizes.items()}
    env = al.LinearEnv(**groups, enable_flashcomm1=flashcomm1)
    op = kind(env, prefix="model.layers.0.o_proj")
    tp, k = sizes["tp"], op.tp_size
    rows, row = kind.__name__ in ("MLPRowParallelOp",), isinstance(op, al.CustomRowParallelOp)
    own = TOKENS // tp if flashcomm1 and (not row or rows) else TOKENS  # tokens that this rank has before the layer
    features = (
        INPUTS
        if not row or kind is al.OProjRowParallelOp
        else INPUTS // (tp if kind is al.Flashcomm2OProjRowParallelOp else k)
    )

    def gemm(x, weight, bias):
        products.append(x.shape)
        return torch.nn.functional.linear(x, weight, bias)

    weight = torch.ones(OUTPUTS, INPUTS // k) if row else torch.ones(OUTPUTS // k, INPUTS)
    op.update_attrs(al.LinearParams(weight=weight, return_bias=False, gemm=gemm))
    op.apply(torch.ones(own * (k if rows else 1), features), al.StepState(flashcomm1=flashcomm1))

    cost = op.cost(al.LayerSize(inputs=INPUTS, outputs=OUTPUTS, element_bytes=4), flashcomm1=flashcomm1)
    assert cost.launches == len(sent) + len(products)
    assert cost.bytes_per_token * TOKENS == pytest.approx(sum(sent))


def test_every_op_is_among_the_cases():
    def kinds(kind):
        return {kind} | {
            found
            for child in kind.__subclasses__()
            if child.__module__.startswith("ascend_linear")
            for found in kinds(child)
        }

    # These need a fused kernel, or a series of layers, to run.
    others = {al.CustomLinearOp, al.MatmulAllreduceRowParallelOp, al.Flashcomm2OshardQKVParallelOp}
    assert kinds(al.CustomLinearOp) - others == {kind for kind, _, _ in CASES}


def test_fused_kernels_and_streamed_weights():
    layer = al.LayerSize(inputs=INPUTS, outputs=OUTPUTS, element_bytes=2)
    sent, tp = [], Recording(4, [])
    plain = al.CustomRowParallelOp(al.LinearEnv(tp=tp)).cost(layer)
    fused = al.MatmulAllreduceRowParallelOp(al.LinearEnv(tp=tp, enable_matmul_allreduce=True)).cost(layer)
    assert (plain.bytes_per_token, plain.launches) == (2 * OUTPUTS * 2 * 3 / 4, 2)
    assert (fused.bytes_per_token, fused.launches) == (plain.bytes_per_token, 1)
    scattered = al.SequenceRowParallelOp(al.LinearEnv(tp=tp, enable_flashcomm1=True, enable_matmul_reduce_scatter=True))
    assert scattered.cost(layer, flashcomm1=True).launches == 1
    assert (
        al.CustomRowParallelOp(al.LinearEnv(tp=tp)).cost(
            al.LayerSize(inputs=8, outputs=8, element_bytes=2, reduced_later=True)
        )
        == al.Cost()
    )
    env = al.LinearEnv(
        tp=tp, flashcomm2_odp=tp, layer_sharding=("o_proj",), o_shard=al.LayerShard(Recording(4, sent)), enable_flashcomm1=True
    )  # fmt: skip
    o_proj = al.Flashcomm2OProjRowParallelOp(env, prefix="layers.0.o_proj").cost(layer, flashcomm1=True)
    assert (o_proj.weight_ranks, o_proj.launches) == (4, 3)  # all-to-all, product, broadcast
    qkv = al.Flashcomm2OshardQKVParallelOp(env, prefix="layers.0.qkv_proj").cost(layer, flashcomm1=True)
    assert (qkv.bytes_per_token, qkv.launches, qkv.weight_ranks) == (INPUTS * 2 * 3 / 4, 2, 1)
