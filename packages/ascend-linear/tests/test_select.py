# SPDX-License-Identifier: Apache-2.0
"""Which layer gets which op, and which options fit together."""

import ascend_linear as al
import pytest
from ascend_comm import Solo

LAYER = "model.layers.3."
MOE = al.MoeLayers(routed_experts=8, layers=frozenset(range(2, 32)))


class Ranks(Solo):
    """A group that only knows its size and where this rank stands."""

    def __init__(self, world_size: int, rank_in_group: int = 0) -> None:
        super().__init__()
        self.world_size, self.rank_in_group, self.ranks = world_size, rank_in_group, list(range(world_size))


TP1, TP4, K2 = Ranks(1), Ranks(4, 3), Ranks(2, 1)
FC1 = {"tp": TP4, "enable_flashcomm1": True}
FC2 = {"tp": TP4, "flashcomm2_odp": Ranks(2), "flashcomm2_otp": K2}
DSA = {**FC1, "enable_dsa_cp": True}
MLP = {"tp": TP4, "mlp_tp": K2}
O_SHARD = {**FC2, "layer_sharding": ("o_proj",), "o_shard": al.LayerShard(Ranks(2))}
FUSED = {"tp": TP4, "enable_matmul_allreduce": True}

CASES = [
    # options, direction, prefix, op, tp_rank, tp_size
    ({"tp": TP4}, "column", LAYER + "self_attn.qkv_proj", None, 3, 4),
    ({"tp": TP4}, "row", LAYER + "self_attn.o_proj", None, 3, 4),
    (DSA, "column", LAYER + "self_attn.q_b_proj", al.ShardedCPColumnParallelOp, 0, 1),
    (DSA, "column", LAYER + "self_attn.kv_b_proj", al.ShardedCPColumnParallelOp, 0, 1),
    (DSA, "row", LAYER + "self_attn.o_proj", al.SequenceRowParallelOp, 3, 4),
    ({**DSA, "layer_sharding": ("o_proj",)}, "row", LAYER + "self_attn.o_proj", al.ShardedCPRowParallelOp, 0, 1),
    ({**FC1, "layer_sharding": ("o_proj",)}, "row", LAYER + "self_attn.o_proj", al.SequenceRowParallelOp, 3, 4),
    (MLP, "column", LAYER + "mlp.gate_up_proj", al.MLPColumnParallelOp, 1, 2),
    (MLP, "row", LAYER + "mlp.down_proj", al.MLPRowParallelOp, 1, 2),
    (MLP, "row", LAYER + "self_attn.o_proj", None, 3, 4),
    ({**MLP, "moe": MOE}, "column", "model.layers.1.mlp.gate_up_proj", al.MLPColumnParallelOp, 1, 2),
    ({**MLP, "moe": MOE}, "column", LAYER + "mlp.shared_experts.gate_up_proj", None, 3, 4),
    ({**MLP, "moe": MOE}, "row", LAYER + "mlp.shared_experts.down_proj", None, 3, 4),
    ({**MLP, **FC1}, "row", LAYER + "mlp.down_proj", al.MLPRowParallelOp, 1, 2),
    ({**MLP, **FC1}, "column", LAYER + "self_attn.qkv_proj", al.SequenceColumnParallelOp, 3, 4),
    ({**MLP, **FC1, "moe": MOE}, "row", LAYER + "mlp.down_proj", al.SequenceRowParallelOp, 3, 4),
    ({"tp": TP1, "otp": K2}, "row", LAYER + "self_attn.o_proj", al.OProjRowParallelOp, 1, 2),
    ({"tp": TP1, "otp": K2}, "row", LAYER + "self_attn.out_proj", None, 0, 1),
    ({"tp": TP1, "otp": K2}, "row", LAYER + "mlp.down_proj", None, 0, 1),
    (FC2, "row", LAYER + "self_attn.o_proj", al.Flashcomm2OProjRowParallelOp, 1, 2),
    (FC2, "row", LAYER + "linear_attn.out_proj", al.Flashcomm2OProjRowParallelOp, 1, 2),
    (FC2, "row", LAYER + "mlp.down_proj", None, 3, 4),
    (FC2, "column", LAYER + "self_attn.qkv_proj", None, 3, 4),
    ({"tp": TP4, "flashcomm2_odp": TP4}, "row", LAYER + "self_attn.o_proj", al.Flashcomm2OProjRowParallelOp, 0, 1),
    ({**FC2, **FC1}, "row", LAYER + "self_attn.o_proj", al.Flashcomm2OProjRowParallelOp, 1, 2),
    ({**FC2, **FC1}, "row", LAYER + "mlp.down_proj", al.SequenceRowParallelOp, 3, 4),
    *[
        (FC1, "column", LAYER + name, al.SequenceColumnParallelOp, 3, 4)
        for name in ("mlp.gate_up_proj", "ssm.in_proj", "attn.qkv_proj", "ssm.conv1d", "attention.query_key_value")
    ],
    *[
        (FC1, "row", LAYER + name, al.SequenceRowParallelOp, 3, 4)
        for name in ("self_attn.o_proj", "ssm.out_proj", "mlp.down_proj", "attention.dense")
    ],
    (FC1, "row", LAYER + "mlp.dense", None, 3, 4),
    (FC1, "row", LAYER + "self_attention.dense", None, 3, 4),
    (FC1, "row", LAYER + "self_attn.wo_proj", None, 3, 4),
    (FC1, "row", LAYER + "o_proj.inner", None, 3, 4),
    (FC1, "row", "o_proj", al.SequenceRowParallelOp, 3, 4),
    (FC1, "column", LAYER + "mlp.shared_expert.gate_up_proj", None, 3, 4),
    (FC1, "row", LAYER + "mlp.shared_experts.down_proj", None, 3, 4),
    (FC1, "row", "vision_tower.encoder.layers.0.self_attn.out_proj", None, 3, 4),
    (FC1, "column", "visual.blocks.0.mlp.gate_up_proj", None, 3, 4),
    (FC1, "row", "thinker.audio_tower.layers.0.self_attn.out_proj", None, 3, 4),
    (FC1, "row", "multi_modal_projector.down_proj", None, 3, 4),
    (FC1, "row", "language_model.model.layers.0.mlp.down_proj", al.SequenceRowParallelOp, 3, 4),
    (FUSED, "row", LAYER + "self_attn.o_proj", al.MatmulAllreduceRowParallelOp, 3, 4),
    (FUSED, "row", LAYER + "mlp.w2", al.MatmulAllreduceRowParallelOp, 3, 4),
    (FUSED, "row", "visual.blocks.0.attn.proj", None, 3, 4),
    (FUSED, "column", LAYER + "self_attn.qkv_proj", None, 3, 4),
    ({**MLP, **FUSED}, "row", LAYER + "mlp.down_proj", al.MLPRowParallelOp, 1, 2),
    *[
        (O_SHARD, "column", LAYER + name, al.Flashcomm2OshardQKVParallelOp, 3, 4)
        for name in ("self_attn.qkv_proj", "ssm.conv1d", "attention.query_key_value")
    ],
    (O_SHARD, "row", LAYER + "self_attn.o_proj", al.Flashcomm2OProjRowParallelOp, 1, 2),
    (O_SHARD, "column", LAYER + "mlp.gate_up_proj", None, 3, 4),
    ({**O_SHARD, **FC1}, "column", LAYER + "self_attn.qkv_proj", al.Flashcomm2OshardQKVParallelOp, 3, 4),
    ({**O_SHARD, **FC1}, "column", LAYER + "mlp.gate_up_proj", al.SequenceColumnParallelOp, 3, 4),
    ({**FC1, "enable_shared_expert_dp": True}, "row", LAYER + "mlp.shared_expert.down_proj", None, 0, 1),
    ({**FC1, "enable_shared_expert_dp": True}, "row", LAYER + "mlp.down_proj", al.SequenceRowParallelOp, 3, 4),
]


@pytest.mark.parametrize(("options", "direction", "prefix", "kind", "tp_rank", "tp_size"), CASES)
def test_get_parallel_op(options, direction, prefix, kind, tp_rank, tp_size):
    env = al.LinearEnv(**options)
    op, *shard = al.get_parallel_op(direction, prefix, env)
    assert (type(op) if op else None, shard) == (kind, [tp_rank, tp_size])
    assert op is None or (op.prefix, op.tp_rank, op.tp_size) == (prefix, tp_rank, tp_size)
    assert al.get_parallel_op(direction, prefix, env, disable_tp=True) == (None, 0, 1)


def test_every_op_of_the_tree_is_chosen_somewhere():
    chosen = {kind for *_, kind, _, _ in CASES if kind}
    named = {name for name in al.__all__ if name.endswith("Op")}
    bases = {"CustomLinearOp", "CustomColumnParallelOp", "CustomRowParallelOp", "CustomReplicatedOp"}
    assert {kind.__name__ for kind in chosen} == named - bases


@pytest.mark.parametrize(
    ("options", "prefix", "message"),
    [
        ({**O_SHARD, "o_shard": None}, LAYER + "attn.qkv_proj", "env.o_shard=None: Flashcomm2OshardQKV.* needs"),
        (O_SHARD, "model.qkv_proj", "prefix='model.qkv_proj': .* needs 'layers.<n>' in it"),
    ],
)
def test_what_o_sharding_needs(options, prefix, message):
    with pytest.raises(ValueError, match=message):
        al.get_parallel_op("column", prefix, al.LinearEnv(**options))


def test_direction_is_checked():
    with pytest.raises(ValueError, match="direction='both': must be 'column' or 'row'"):
        al.get_parallel_op("both", "o_proj", al.LinearEnv(tp=TP1))


def test_get_replicated_op():
    env = al.LinearEnv(tp=TP4)
    op = al.get_replicated_op("model.layers.0.mlp.gate", env)
    assert (type(op), op.tp_rank, op.tp_size, op.group.ranks) == (al.CustomReplicatedOp, 0, 1, [3])
    assert al.get_replicated_op("model.layers.0.mlp.gate", env, disable_tp=True) is None


@pytest.mark.parametrize(
    ("prefix", "experts", "expected"),
    [
        ("model.layers.3.mlp", 8, True),
        ("language_model.model.layers.14.mlp.gate_up_proj", 8, True),
        ("model.layers.2.mlp", 8, False),
        ("model.layers.3.mlp", 0, False),
        ("model.embed_tokens", 8, False),
        ("model.layers.x.mlp", 8, False),
        ("model.sublayers.3.mlp", 8, False),
        ("model.layers", 8, False),
    ],
)
def test_is_moe_layer(prefix, experts, expected):
    moe = al.MoeLayers(routed_experts=experts, layers=frozenset({3, 14}))
    assert al.is_moe_layer(prefix, moe) is expected


def test_shared_experts_take_no_part_in_mlp_tp():
    """The MoE layer sums their output with that of the routed experts, also where no key names the MoE layers."""
    env = al.LinearEnv(tp=TP1, mlp_tp=K2, moe=al.MoeLayers(routed_experts=8))
    for direction, name in (("column", "gate_up_proj"), ("row", "down_proj")):
        assert al.get_parallel_op(direction, f"model.layers.0.mlp.{name}", env).op is not None
        assert al.get_parallel_op(direction, f"model.layers.0.mlp.shared_expert.{name}", env).op is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": TP4, "otp": K2}, "otp=2: needs tp=4 to be 1"),
        ({"tp": TP1, "enable_flashcomm1": True}, "enable_flashcomm1=True: needs tp=1 to be larger than 1"),
        ({"tp": TP4, "enable_dsa_cp": True}, "enable_dsa_cp=True: cannot be used with enable_flashcomm1=False"),
        ({**FC1, "enable_matmul_allreduce": True}, "allreduce=True: cannot be used with enable_flashcomm1=True"),
        ({**FC2, "enable_matmul_allreduce": True}, "allreduce=True: cannot be used with flashcomm2_odp="),
        ({"tp": Ranks(3), "enable_matmul_allreduce": True}, r"allreduce=True: needs tp=3 to be one of \(1, 2, 4, 8\)"),
        (
            {"tp": TP4, "enable_matmul_reduce_scatter": True},
            "reduce_scatter=True: cannot be used with enable_flashcomm1=False",
        ),
        ({**FC1, "enable_matmul_reduce_scatter": True, "moe": MOE}, "needs a dense model, but has routed_experts=8"),
        (
            {"tp": Ranks(16), "enable_flashcomm1": True, "enable_matmul_reduce_scatter": True},
            r"reduce_scatter=True: needs tp=16 to be one of \(2, 4, 8\)",
        ),
        ({**O_SHARD, "layer_sharding": ()}, "o_shard=.*: needs flashcomm2_odp=.* and layer_sharding=.* to be"),
        (
            {"tp": TP4, "layer_sharding": ("o_proj",), "o_shard": O_SHARD["o_shard"]},
            "o_shard=.*: needs flashcomm2_odp=0 to be 2 or more",
        ),
        ({"tp": TP4, "flashcomm2_otp": K2}, "flashcomm2_otp=2: needs flashcomm2_odp=0"),
        (
            {"tp": TP4, "flashcomm2_odp": K2},
            "flashcomm2_odp=2: must be 2 or more, and its product with flashcomm2_otp=1 must be tp=4",
        ),
        ({"tp": TP4, "flashcomm2_odp": TP1, "flashcomm2_otp": TP4}, "flashcomm2_odp=1: must be 2 or more"),
        ({"tp": TP1, "flashcomm2_odp": K2, "otp": K2}, "flashcomm2_odp=2: cannot be used with otp=2: both cut o_proj"),
        ({**FC2, "layer_sharding": ("o_proj", "q_b_proj")}, "must be .'o_proj',. or empty with FlashComm2"),
        ({"tp": TP1, "dp_rank": -1}, "dp_rank=-1: must be at least 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        al.LinearEnv(**options)


def test_moe_layers_are_checked():
    with pytest.raises(ValueError, match="routed_experts=-1"):
        al.MoeLayers(routed_experts=-1)


@pytest.mark.parametrize(
    ("tokens", "env", "options", "expected"),
    [
        (1001, {"tp": TP4}, {}, (False, 0)),
        (1000, FC1, {}, (False, 0)),
        (1001, FC1, {}, (True, 3)),
        (5, FC1, {"threshold": 4}, (True, 3)),
        (8, FC1, {"threshold": 4}, (True, 0)),
        (1, {**FC1, "moe": MOE}, {}, (True, 3)),
        (0, {**FC1, "moe": MOE}, {}, (True, 0)),
        (3, {**FC1, "dp_rank": 1}, {"threshold": 4, "dp_tokens": (6, 3)}, (True, 5)),
        (3, {**FC1, "dp_rank": 1}, {"threshold": 6, "dp_tokens": (6, 3)}, (False, 0)),
        (1001, FC1, {"prefill": True}, (True, 3)),
        (1000, FC1, {"prefill": True}, (False, 0)),
    ],
)
def test_plan_step(tokens, env, options, expected):
    state = al.plan_step(tokens, al.LinearEnv(**env), **options)
    assert (state.flashcomm1, state.pad_size) == expected
    assert state.dp_tokens == options.get("dp_tokens")
    assert state.prefill == options.get("prefill", False)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (-1, {}, "tokens=-1"),
        (1, {"threshold": -1}, "threshold=-1"),
        (1, {"dp_tokens": (2, 1)}, "entry dp_rank=0 must be tokens=1"),
        (1, {"dp_tokens": ()}, "entry dp_rank=0 must be tokens=1"),
    ],
)
def test_plan_step_refuses(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        al.plan_step(tokens, al.LinearEnv(**FC1), **options)


@pytest.mark.parametrize(("options", "message"), [((True, -1), "pad_size=-1"), ((False, 1), "must be 0 where")])
def test_step_state_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        al.StepState(flashcomm1=options[0], pad_size=options[1])
