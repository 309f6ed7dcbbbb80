# SPDX-License-Identifier: Apache-2.0
"""Every op equals the unsharded float64 product: in processes over gloo, FlashComm2's larger grids in threads."""

import ascend_linear as al
import linear_cases
import pytest
import shard_cases
import torch
from ascend_comm import GroupConfig, Solo, Topology
from spawned import NO_NPU, in_threads, spawn


@pytest.mark.parametrize(
    ("case", "world"), [(linear_cases.world_of_2, 2), (linear_cases.world_of_4, 4), (shard_cases.world_of_4, 4)]
)
def test_over_gloo(case, world, tmp_path):
    spawn(case, world, tmp_path, NO_NPU)


@pytest.mark.parametrize(("tp", "k"), [(6, 2), (6, 3), (8, 2), (8, 4), (16, 2)])
def test_flashcomm2_grids(tp, k):
    topology = Topology(tp, tensor_parallel=tp)
    in_threads(linear_cases.flashcomm2, GroupConfig(topology=topology, parallel=("tp",), mc2=False, flashcomm2=k))


def test_all_ops_on_one_rank():
    config = GroupConfig(topology=Topology(1), parallel=("tp", "dp"), mc2=False, mlp_tp=1, otp=1)
    for case in (linear_cases.mlp, linear_cases.oproj):
        in_threads(case, config)


def test_the_layer_gives_the_product():
    calls = []

    def gemm(x, weight, bias):
        calls.append((x.shape, weight.dtype, bias))
        return x @ weight.to(x.dtype).T

    op = al.CustomRowParallelOp(al.LinearEnv(tp=Solo()))
    op.update_attrs(al.LinearParams(weight=torch.ones(3, 2, dtype=torch.int8), gemm=gemm, return_bias=False))
    assert op.apply(torch.ones(5, 2)).tolist() == [[2.0] * 3] * 5
    assert calls == [((5, 2), torch.int8, None)]


def test_a_replaced_weight_needs_update_attrs():
    op = al.CustomReplicatedOp(al.LinearEnv(tp=Solo(rank=7)), prefix="model.lm")
    assert repr(op) == "CustomReplicatedOp(prefix='model.lm', ranks=[7])"
    with pytest.raises(RuntimeError, match=r"'model.lm'.*has no weight yet: call update_attrs"):
        op.apply(torch.ones(1, 2))
    for value in (1.0, 3.0):
        op.update_attrs(al.LinearParams(weight=torch.full((1, 2), value)))
        assert op.apply(torch.ones(1, 2))[0].item() == 2 * value


class Ranks(Solo):
    """A group that only knows its size: for what must fail before anything is exchanged."""

    def __init__(self, world_size: int, rank_in_group: int = 0) -> None:
        super().__init__()
        self.world_size, self.rank_in_group = world_size, rank_in_group

    def all_gather(self, input_, dim=-1):
        return torch.cat([input_] * self.world_size, dim)


@pytest.mark.parametrize(
    ("kind", "shape", "flags", "message"),
    [
        (al.CustomRowParallelOp, (5, 9), {"input_is_parallel": False}, "has 9 features, must be a multiple of 4 ranks"),
        (al.SequenceRowParallelOp, (5, 9), {"reduce_results": False}, "reduce_results=False: .* must be True"),
        (al.SequenceRowParallelOp, (5, 8), {}, "pad_size=2: .* has 7 rows with it, must be a multiple of 4 ranks"),
        (al.SequenceRowParallelOp, (8,), {}, r"input_ of shape \(8,\) must be \[tokens, features\]"),
        (al.SequenceColumnParallelOp, (0, 8), {}, "pad_size=2: .* gathered only 0 rows"),
        (al.SequenceColumnParallelOp, (1, 2, 8), {}, r"shape \(1, 2, 8\) must be"),
        (al.Flashcomm2OProjRowParallelOp, (5, 8), {}, "pad_size=2: .* has 7 rows with it, must be a multiple of 4"),
        (al.Flashcomm2OProjRowParallelOp, (8,), {}, "must be .tokens, features"),
        (al.Flashcomm2OProjRowParallelOp, (5, 8), {"reduce_results": False}, "must be True"),
        (al.MLPRowParallelOp, (5, 8), {}, "has 5 tokens, must be 2 times those of a rank"),
        (al.MLPRowParallelOp, (4, 8), {"reduce_results": False}, "must be True"),
        (al.MLPColumnParallelOp, (8,), {}, "must be .tokens, features"),
    ],
)
def test_what_does_not_fit_is_refused(kind, shape, flags, message):
    env = al.LinearEnv(tp=Ranks(4), mlp_tp=Ranks(2), flashcomm2_odp=Ranks(4), enable_flashcomm1=True)
    params = al.LinearParams(weight=torch.zeros(2, shape[-1]), **flags)
    with pytest.raises(ValueError, match=message):
        use(kind(env), params, torch.zeros(shape), al.StepState(flashcomm1=True, pad_size=2))


def use(op, params, x, state):
    op.update_attrs(params)
    op.apply(x, state)


def test_token_counts_matter_within_the_group_only():
    group = Ranks(2, rank_in_group=1)
    op = al.MLPColumnParallelOp(al.LinearEnv(tp=Solo(), mlp_tp=group, dp_rank=3))
    op.update_attrs(al.LinearParams(weight=torch.zeros(2, 8), return_bias=False))
    assert op.apply(torch.zeros(4, 8), al.StepState(dp_tokens=(5, 6, 4, 4))).shape == (8, 2)
    with pytest.raises(ValueError, match=r"dp_tokens=\(4, 4, 6, 4\): .* needs equal counts on its ranks, got \(6, 4\)"):
        op.apply(torch.zeros(4, 8), al.StepState(dp_tokens=(4, 4, 6, 4)))
    op.apply(torch.zeros(4, 8), al.StepState(dp_tokens=(4, 4, 6, 4), flashcomm1=True))


def test_sharded_cp_never_reduces():
    op = al.ShardedCPRowParallelOp(al.LinearEnv(tp=Solo()))
    op.update_attrs(al.LinearParams(weight=torch.zeros(2, 8)))
    assert op.params.reduce_results is False


def test_oproj_features_must_divide():
    op = al.OProjRowParallelOp(al.LinearEnv(tp=Solo(), otp=Ranks(4)))
    op.update_attrs(al.LinearParams(weight=torch.zeros(2, 9)))
    with pytest.raises(ValueError, match="has 9 features, must be a multiple of 4 ranks"):
        op.apply(torch.zeros(5, 9))


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        (al.MLPColumnParallelOp, "mlp_tp"),
        (al.MLPRowParallelOp, "mlp_tp"),
        (al.OProjRowParallelOp, "otp"),
        (al.Flashcomm2OProjRowParallelOp, "flashcomm2_odp"),
    ],
)
def test_an_op_without_its_group(kind, group):
    with pytest.raises(ValueError, match=rf"env.{group}=None: {kind.__name__} needs this group"):
        kind(al.LinearEnv(tp=Solo()))
