# SPDX-License-Identifier: Apache-2.0
"""Options for linear layers: what is read, and the one error that each broken rule gives before anything starts."""

import dataclasses
import pickle
import re
from dataclasses import replace

import pytest
from ascend_comm import GroupConfig, InvalidValueError, Topology
from ascend_linear import LinearEnv, MoeLayers
from vllm_ascend import envs
from vllm_ascend.config import AscendConfig, FinegrainedTP
from vllm_ascend.deployment import Deployment, Model
from vllm_ascend.rules import _OPTIONS, broken, check, group_config, planned_env

DENSE = Model(vocabulary=1000, dense_width=128, attention_width=256)
MOE = Model(moe=MoeLayers(routed_experts=8), vocabulary=1000, dense_width=128, attention_width=256)
TIED = Model(moe=MoeLayers(routed_experts=8), vocabulary=1000, dense_width=128, tied_embeddings=True)


def over(dp=1, pp=1, tp=1, **more):
    """A deployment; a dense model's replicas are apart."""
    model = more.pop("model", DENSE)
    replicas = dp if model.moe.routed_experts else 1
    return Deployment(
        topology=Topology(replicas * pp * tp, replicas, pp, 1, tp), data_parallel_asked=dp, model=model, **more
    )


def fine(**sizes):
    return {"finegrained_tp_config": {f"{name}_tensor_parallel_size": size for name, size in sizes.items()}}


def test_what_is_read():
    read = AscendConfig.of(
        {
            "enable_flashcomm1": True,
            "flashcomm1_dense_threshold": 7,
            "flashcomm2_parallel_size": 2,
            "layer_sharding": ["o_proj"],
            "finegrained_tp_config": {"mlp_tensor_parallel_size": 4, "oproj_tensor_parallel_size": None},
            "weight_prefetch_config": {"enabled": True, "prefetch_ratio": {"attn": {"qkv": 0.5}, "mlp": {"down": 0}}},
            "enable_shared_expert_dp": None,
        }
    )
    assert read.enable_flashcomm1 is True
    assert (read.flashcomm1_dense_threshold, read.flashcomm2_parallel_size) == (7, 2)
    assert read.layer_sharding == ("o_proj",)
    assert read.finegrained_tp_config == FinegrainedTP(mlp_tensor_parallel_size=4)
    ratios = read.weight_prefetch_config.prefetch_ratio.by_module
    assert ratios == {"qkv": 0.5, "o": 1.0, "gate_up": 1.0, "down": 0}
    assert read.enable_shared_expert_dp is False


def deep():
    """A list in a list in a list, deeper than Python's repr goes."""
    value = []
    for _ in range(100_000):
        value = [value]
    return value


WRONG_VALUES = [
    ({"enable_flashcomm1": 1}, "option 'enable_flashcomm1' (1) must be true or false"),
    ({"flashcomm2_parallel_size": True}, "option 'flashcomm2_parallel_size' (True) must be a whole number, 0 or more"),
    ({"flashcomm2_parallel_size": -1}, "option 'flashcomm2_parallel_size' (-1) must be a whole number, 0 or more"),
    ({"flashcomm1_dense_threshold": 2.5}, "'flashcomm1_dense_threshold' (2.5) must be a whole number"),
    ({"layer_sharding": "o_proj"}, "option 'layer_sharding' ('o_proj') must be a list of names"),
    ({"finegrained_tp_config": 2}, "option 'finegrained_tp_config' (2) must be an object with the keys"),
    (fine(mpl=2), "'finegrained_tp_config' has an unknown option 'mpl_tensor_parallel_size' (2); did you mean mlp_tensor_parallel_size"),
    (fine(mlp="2"), "option 'finegrained_tp_config.mlp_tensor_parallel_size' ('2') must be a whole number"),
    ({"weight_prefetch_config": {"prefetch_ratio": {"attn": {"o": 1.5}}}}, "'weight_prefetch_config.prefetch_ratio.attn.o' (1.5) must be a number from 0 to 1"),
    ({"enable_dsa_cp": True}, "option 'enable_dsa_cp' (True) of the public plugin is not supported"),
    ({3: True}, "additional_config has the key 3, which must be a text"),
    ({"finegrained_tp_config": {None: 2}}, "option 'finegrained_tp_config' has the key None, which must be a text"),
    ({"enable_flashcomm1": deep()}, "option 'enable_flashcomm1' ([[[[[...]]]]]) must be true or false"),
    ({"x" * 10**6: deep()}, "unknown option 'xxx"),
    ({"flashcomm2_parallel_size": 2**31}, "(2147483648) must be a whole number, 0 or more and at most 2147483647"),
    ({"flashcomm2_parallel_size": 10**5000}, "option 'flashcomm2_parallel_size' (a very long int) must be a whole number"),
    ({"dynamic_eplb": False}, "unknown option 'dynamic_eplb' (False); it belongs at 'eplb_config.dynamic_eplb'"),
    ({"num_iterations_eplb_update": 400}, "is not supported by this one; it is now eplb_config.expert_heat_collection_interval"),
    ({"mega_moe_max_tokens": {"enabled": False}}, "option 'mega_moe_max_tokens' ({'enabled': False}) of the public plugin is not supported"),
    ({"expert_map_path": "m.json"}, "unknown option 'expert_map_path' ('m.json'); it belongs at 'eplb_config.expert_map_path'"),
    ({"lmhead_tensor_parallel_size": 2}, "it belongs at 'finegrained_tp_config.lmhead_tensor_parallel_size'"),
    ({"eplb_config": {"enable_flashcomm1": True}}, "'eplb_config' has an unknown option 'enable_flashcomm1' (True); it belongs at 'enable_flashcomm1'"),
    ({"mlp_tensor_parallel": 2}, "did you mean finegrained_tp_config.mlp_tensor_parallel_size"),
    ({"torchair_graph_config": {"enabled": True}}, "nothing is captured as a graph here; remove it"),
    ({"ascend_scheduler_config": {"enabled": True}}, "give vLLM's own options of the scheduler"),
    ({"scheduler_config": {"policy": "x"}}, "option 'scheduler_config' ({'policy': 'x'}) of the public plugin is not supported by this one; remove it, or set it to {}"),
    ({"enable_sparse_sfa_c8": True}, "of the public plugin is not supported by this one; remove it, or set it to False"),
    ({"dump_config_path": "x"}, "option 'dump_config_path' ('x') of the public plugin is not supported by this one; remove it"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), WRONG_VALUES)
def test_a_wrong_value_is_named(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AscendConfig.of(given)


def test_everything_that_is_wrong_is_one_error():
    given = {
        "enable_flashcomm1": 1, "enable_dsa_cp": True, 7: 7,
        "finegrained_tp_config": {"mlp_tensor_parallel_size": "2", "mpl_tensor_parallel_size": 2},
        "eplb_config": {"layout": "random", "expert_load_record_path": "load.csv", "num_redundant_experts": 2},
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"^8 things are wrong with this configuration:\n1\. environment variable"
    ) as caught:
        AscendConfig.of(given, {"VLLM_ASCEND_ENABLE_NZ": "weight_nz_mode"})
    lines = str(caught.value).splitlines()
    for line, name in zip(
        lines[1:], ["ENABLE_NZ", "flashcomm1", "dsa_cp", "key 7", "'2'", "mpl", "layout", "load.csv"], strict=True
    ):
        assert name in line
    config, findings = AscendConfig.read(given)
    assert len(findings) == 7
    assert config == AscendConfig()
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), type(again)) == (str(caught.value), type(caught.value))


BROKEN_RULES = [
    ({"enable_flashcomm1": True}, over(), "option 'enable_flashcomm1' (True) needs tensor_parallel_size > 1, got 1"),
    ({"enable_flashcomm1": True}, over(tp=2, model=MOE), "of a MoE model needs enable_expert_parallel"),
    ({"enable_flashcomm1": True}, over(dp=2, tp=2, model=MOE, expert_parallel=True), "needs data_parallel_size 1, got 2"),
    ({"enable_flashcomm1": True}, over(tp=2, model=Model(latent_attention=True)), "cannot be used with multi-head latent attention"),
    ({"enable_flashcomm1": True}, over(tp=2, model=Model(multimodal=True)), "cannot be used with a multimodal model"),
    ({"enable_flashcomm1": True}, over(tp=2, speculative=True), "cannot be used with speculative decoding"),
    ({}, over(model=Model(moe=MoeLayers(routed_experts=8), experts_per_token=9)), "config asks for 9 experts a token, and its MoE layers have 8"),
    ({}, over(dp=2, model=MOE, microbatches=True), "microbatches (enable_dbo) cannot be used with a MoE model"),
    ({"flashcomm2_parallel_size": 1}, over(tp=2, microbatches=True), "microbatches (enable_dbo) cannot be used"),
    ({"flashcomm2_parallel_size": 3}, over(tp=4), "flashcomm2_parallel_size"),
    ({"flashcomm2_parallel_size": 4}, over(tp=4), "flashcomm2_parallel_size"),
    ({"flashcomm2_parallel_size": 2}, over(tp=4, kv_role="consumer"), "'flashcomm2_parallel_size' (2) cannot be used on a decode-only node"),
    ({"enable_matmul_allreduce": True, "flashcomm2_parallel_size": 1}, over(tp=2), "(True) cannot be used with flashcomm2_parallel_size"),
    ({"enable_matmul_allreduce": True}, over(tp=3), "needs tensor_parallel_size (3) to be one of (1, 2, 4, 8)"),
    ({"layer_sharding": ["o_proj"]}, over(tp=2), "option 'layer_sharding' (['o_proj']) needs flashcomm2_parallel_size"),
    ({"layer_sharding": ["q_b_proj"], "flashcomm2_parallel_size": 1}, over(tp=2), "must be ('o_proj',) with flashcomm2_parallel_size (1)"),
    ({"enable_shared_expert_dp": True}, over(tp=2, model=MOE), "option 'enable_shared_expert_dp' (True) needs a MoE model with shared experts"),
    (fine(oproj=2), over(dp=2, tp=2, model=MOE), "cannot be used with tensor_parallel_size (2), which must be 1"),
    (fine(mlp=3), over(dp=3, model=MOE), "'finegrained_tp_config.mlp_tensor_parallel_size' (3) must divide intermediate_size of the model, 128"),
    (fine(mlp=4), over(dp=2, model=MOE), "'finegrained_tp_config.mlp_tensor_parallel_size' (4) must divide data_parallel_size (2)"),
    (fine(lmhead=2), over(dp=2), "(2) needs a MoE model: vLLM runs the data parallel ranks of a dense one apart"),
    (fine(lmhead=2), over(dp=2, model=TIED), "must be equal, for the model's LM head is its embedding"),
    (fine(lmhead=2), over(dp=2, model=MOE, speculative=True), "cannot be used with speculative decoding"),
    (fine(embedding=2), over(dp=2, model=MOE, prompt_embeddings=True), "needs a model that is given tokens alone"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "deployment", "message"), BROKEN_RULES)
def test_a_broken_rule_is_named(given, deployment, message):
    (found,) = broken(AscendConfig.of(given), deployment)
    assert message in found


@pytest.mark.parametrize(
    ("given", "deployment", "messages"),
    [
        (fine(lmhead=4), over(dp=2, model=TIED), ["must be equal, for", "(4) must divide data_parallel_size (2)"]),
        (
            {"enable_flashcomm1": True, "enable_matmul_allreduce": True},
            over(tp=2, speculative=True),
            ["cannot be used with speculative decoding", "cannot be used with enable_flashcomm1 (True)"],
        ),
        (
            {"flashcomm2_parallel_size": 2, **fine(oproj=2)},
            over(tp=4, dp=2, model=MOE),
            [
                "(2) cannot be used with finegrained_tp_config.oproj_tensor_parallel_size (2)",
                "with tensor_parallel_size (4), which must be 1",
            ],
        ),
        (
            fine(lmhead=3, mlp=5, oproj=6),
            over(dp=4, model=replace(MOE, vocabulary=960 * 64, dense_width=640, attention_width=960)),
            ["oproj_tensor_parallel_size' (6)", "lmhead_tensor_parallel_size' (3)", "mlp_tensor_parallel_size' (5)"],
        ),
    ],
)
def test_all_broken_rules_are_named(given, deployment, messages):
    found = list(broken(AscendConfig.of(given), deployment))
    assert len(found) == len(messages), found
    for message in messages:
        assert any(message in finding for finding in found), found


# Fields that no option of a user sets, that are checked before the libraries see them, or whose own names stand in messages.
NO_OPTIONS = {
    "parallel", "dynamic_eplb", "pd_tp_ratio", "pd_head_replicas", "hccl_buffsize_mb", "mc2", "topology",  # not passed, or constants
    "dp_rank", "enable_dsa_cp", "enable_matmul_reduce_scatter", "moe",  # set by vllm-ascend as the rules ask
    "kv_role", "world_size",  # are called so in messages
}  # fmt: skip


def test_every_field_of_the_libraries_has_the_name_of_an_option():
    """An InvalidValueError of a field without a name here would reach a user in the library's words."""
    told = {field.name for kind in (GroupConfig, LinearEnv, Topology) for field in dataclasses.fields(kind)}
    own = {field.name for field in dataclasses.fields(AscendConfig)}
    assert told - own - NO_OPTIONS - set(_OPTIONS) == set()
    assert set(_OPTIONS.values()) <= own | {f"finegrained_tp_config.{field.name}" for field in dataclasses.fields(FinegrainedTP)} | {
        "tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"
    }  # fmt: skip
    for field in told - NO_OPTIONS:
        phrased = InvalidValueError(field, "tp of /data/tp/otp", "must divide {tp}", tp=3).renamed(_OPTIONS).phrased()
        assert (
            phrased
            == f"option {_OPTIONS.get(field, field)!r} ('tp of /data/tp/otp') must divide tensor_parallel_size (3)"
        )


def test_all_broken_rules_are_one_error():
    given = {"enable_matmul_allreduce": True, "enable_shared_expert_dp": True, "layer_sharding": ["o_proj"], "eplb_config": {"num_redundant_experts": 1}}  # fmt: skip
    with pytest.raises(ValueError, match="4 things are wrong") as caught:
        check(AscendConfig.of(given), over(tp=3))
    for option in ("matmul_allreduce", "enable_shared_expert_dp", "layer_sharding", "eplb_config"):
        assert option in str(caught.value)


GOOD = [
    ({}, over(dp=2, tp=3)),
    (
        {"weight_prefetch_config": {"prefetch_ratio": {"mlp": {"down": 0.5}}}},
        over(tp=2, microbatches=True),
    ),  # not enabled
    ({"enable_flashcomm1": True, "flashcomm2_parallel_size": 2, "layer_sharding": ["o_proj"]}, over(pp=2, tp=4)),
    ({"enable_flashcomm1": True}, over(tp=2, model=MOE, expert_parallel=True)),
    ({"enable_flashcomm1": True, **fine(mlp=1)}, over(dp=2, tp=2)),
    ({"enable_matmul_allreduce": True, "weight_prefetch_config": {"enabled": True}}, over(tp=8, kv_role="consumer")),
    (fine(oproj=2, mlp=4, lmhead=2, embedding=2), over(dp=4, model=MOE)),
    (fine(lmhead=2, embedding=2), over(dp=4, tp=2, model=TIED)),
]


@pytest.mark.parametrize(("given", "deployment"), GOOD)
def test_what_fits_gives_every_rank_its_groups(given, deployment):
    config = AscendConfig.of(given)
    check(config, deployment)
    families = group_config(config, deployment).families()
    for rank in range(deployment.topology.world_size):
        env = planned_env(config, deployment, rank)
        assert rank in env.tp.ranks
        assert env.enable_flashcomm1 == config.enable_flashcomm1
        if "mlp_tp" in families:
            assert env.mlp_tp.ranks in families["mlp_tp"]
    with pytest.raises(AttributeError, match="only planned"):
        planned_env(config, deployment).tp.all_gather(None)


@pytest.mark.parametrize(
    ("precision", "tp", "fused"), [(True, 2, True), (True, 3, False), (False, 2, False), (True, 16, False)]
)
def test_product_and_reduce_scatter_are_one_kernel_where_it_can(precision, tp, fused):
    env = planned_env(AscendConfig(enable_flashcomm1=True), over(tp=tp, model=Model(half_precision=precision)))
    assert env.enable_matmul_reduce_scatter is fused


def test_model_facts_of_a_config():
    deepseek = {
        "n_routed_experts": 256, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_shared_experts": 1, "num_attention_heads": 128,
        "v_head_dim": 128, "hidden_size": 7168, "vocab_size": 129280, "intermediate_size": 18432, "num_hidden_layers": 61,
    }  # fmt: skip
    model = Model.of(deepseek, latent_attention=True)
    assert model.moe == MoeLayers(routed_experts=256, layers=frozenset(range(3, 61)))
    assert model.shared_experts
    assert (model.attention_width, model.dense_width, model.vocabulary) == (16384, 18432, 129280)
    plain = Model.of({"num_attention_heads": 4, "hidden_size": 64, "tie_word_embeddings": True})
    assert plain == Model(tied_embeddings=True, attention_width=64, hidden=64)
    assert Model.of({"intermediate_size": [64, 128], "num_experts": [8, 8]}) == Model(moe=MoeLayers(routed_experts=8))


def test_a_placement_file_needs_layers_that_are_known():
    model = Model.of({"num_experts": 8, "num_hidden_layers": 4, "expert_block_every": 2})
    deployment = over(dp=2, model=model, expert_parallel=True)
    found = list(broken(AscendConfig.of({"eplb_config": {"expert_map_path": "map.json"}}), deployment))
    assert any("'eplb_config.expert_map_path' ('map.json')" in one and "expert_block_every" in one for one in found)
    assert not list(broken(AscendConfig.of({"eplb_config": {"num_redundant_experts": 2}}), deployment))


def test_hccl_buffer_size(monkeypatch):
    assert envs.hccl_buffsize_mb() == 200
    monkeypatch.setenv("HCCL_BUFFSIZE", "512")
    assert envs.hccl_buffsize_mb() == 512
    monkeypatch.setenv("HCCL_BUFFSIZE", "lots")
    with pytest.raises(ValueError, match="HCCL_BUFFSIZE='lots'"):
        envs.hccl_buffsize_mb()
