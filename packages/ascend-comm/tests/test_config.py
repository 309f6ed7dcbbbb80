# SPDX-License-Identifier: Apache-2.0
"""What a config builds, the communicators that are shared, the memory they cost, and every rule between options."""

import pickle

import pytest
from ascend_comm import GroupConfig, HcclOptions, InvalidValueError, Topology, memory_bytes, plan
from ascend_comm.hccl import data_parallel_buffer_mb, options_for

MB = 2**20
DP_4 = Topology(4, data_parallel=4)
DP_2_TP_4 = Topology(8, data_parallel=2, tensor_parallel=4)
TP_8 = Topology(8, tensor_parallel=8)


def test_families_come_by_name_in_order_of_creation():
    everything = GroupConfig(
        topology=DP_2_TP_4,
        parallel=("dp", "tp"),
        dynamic_eplb=True,
        lmhead_tp=2,
        mlp_tp=1,
        flashcomm2=2,
        layer_sharding=("o_proj",),
        pd_tp_ratio=2,
        kv_role="producer",
    )
    families = everything.families()
    assert list(families) == [
        "tp", "dp", "mc2", "dynamic_eplb", "lmhead_tp", "mlp_tp", "flashcomm2_otp", "flashcomm2_odp", "shard_weight",
        "p_tp",
    ]  # fmt: skip
    assert families["mlp_tp"] == [[rank] for rank in range(8)]
    assert (families["flashcomm2_otp"], families["flashcomm2_odp"]) == DP_2_TP_4.flashcomm2(2)
    assert families["shard_weight"] == DP_2_TP_4.shard_weight(2)
    assert families["p_tp"] == DP_2_TP_4.prefill_tp(2)
    assert list(GroupConfig(topology=DP_2_TP_4).families()) == ["mc2"]
    assert GroupConfig(topology=DP_2_TP_4, mc2=False).families() == {}


def test_otp_is_not_built_where_flashcomm2_replicates():
    assert list(GroupConfig(topology=TP_8, flashcomm2=1).families()) == ["mc2", "flashcomm2_odp"]


@pytest.mark.parametrize(
    ("options", "shards"),
    [({}, 4), ({"weight_shards": 1}, 1), ({"flashcomm2": 2}, 2), ({"flashcomm2": 1}, 1), ({"weight_shards": 2}, 2)],
)
def test_pieces_of_a_sharded_weight(options, shards):
    config = GroupConfig(topology=DP_2_TP_4, layer_sharding=("o_proj",), **options)
    assert config.families()["shard_weight"] == DP_2_TP_4.shard_weight(shards)


@pytest.mark.parametrize(("role", "replicas"), [("both", 1), ("consumer", 1), ("producer", 4)])
def test_p_tp_only_on_the_producer_and_with_several_heads(role, replicas):
    config = GroupConfig(topology=TP_8, pd_tp_ratio=4, pd_head_replicas=replicas, kv_role=role)
    assert "p_tp" not in config.families()


def test_equal_ranks_and_options_share_a_communicator():
    config = GroupConfig(
        topology=DP_4,
        parallel=("dp", "tp"),
        dynamic_eplb=True,
        lmhead_tp=4,
        mlp_tp=4,
        embed_tp=2,
        layer_sharding=("o_proj",),
    )
    shared = [(handle.names, handle.ranks) for handle in plan(config)]
    world = (0, 1, 2, 3)
    assert shared == [
        (("dp",), world),  # 50 MB
        (("mc2",), world),  # HCCL_BUFFSIZE
        (("dynamic_eplb",), world),  # 100 MB
        (("lmhead_tp", "mlp_tp"), world),
        (("embed_tp",), (0, 1)),
        (("embed_tp",), (2, 3)),
        (("shard_weight",), world),  # streamed beside the layers: a lane of its own
    ]
    per_rank = 2 * (50 + 200 + 100 + 200 + 200 + 200) * MB
    assert [memory_bytes(config, rank) for rank in range(4)] == [per_rank] * 4
    with pytest.raises(ValueError, match="rank=4: must be 0 to 3"):
        memory_bytes(config, 4)


def test_memory_follows_hccl_buffsize_only_where_the_kernels_do():
    small = GroupConfig(topology=DP_4, mlp_tp=4, hccl_buffsize_mb=64)
    assert memory_bytes(small, 0) == 2 * (64 + 200) * MB
    assert memory_bytes(GroupConfig(topology=Topology(1)), 0) == 0


def test_buffer_sizes():
    assert data_parallel_buffer_mb(1) == 50
    assert data_parallel_buffer_mb(50 * MB // 4 - 1) == 50
    assert data_parallel_buffer_mb(50 * MB // 4) == 51
    assert options_for("mc2", 2) == HcclOptions(buffer_mb=None)
    assert options_for("dynamic_eplb", 2).buffer_mb == 100
    assert options_for("flashcomm2_odp", 2) == options_for("mlp_tp", 2) == HcclOptions(buffer_mb=200)
    assert options_for("shard_weight", 2) != options_for("mlp_tp", 2)
    assert HcclOptions(buffer_mb=None).memory_bytes(300) == 600 * MB
    with pytest.raises(ValueError, match="buffer_mb=0"):
        HcclOptions(buffer_mb=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": DP_4, "mlp_tp": 3}, r"mlp_tp=3: must divide data_parallel=4.*\[1, 2, 4\]"),
        ({"topology": DP_4, "lmhead_tp": -1}, "lmhead_tp=-1: must be at least 0"),
        ({"topology": DP_2_TP_4, "otp": 2}, "otp=2: cannot be used with tensor_parallel=4, which must be 1"),
        ({"topology": DP_4, "otp": 2, "flashcomm2": 2}, "flashcomm2=2: cannot be used with otp=2: both cut o_proj"),
        (
            {"topology": TP_8, "flashcomm2": 8},
            r"flashcomm2=8: must divide tensor_parallel=8 and be smaller.*\[1, 2, 4\]",
        ),
        (
            {"topology": TP_8, "flashcomm2": 2, "kv_role": "consumer"},
            "flashcomm2=2: cannot be used on a decode-only node, kv_role='consumer'",
        ),
        (
            {"topology": TP_8, "flashcomm2": 2, "layer_sharding": ("o_proj", "q_b_proj")},
            r"must be \('o_proj',\) with flashcomm2=2",
        ),
        ({"topology": TP_8, "layer_sharding": ("o_proj",), "kv_role": "consumer"}, "layer_sharding=.* decode-only"),
        ({"topology": TP_8, "weight_shards": 2}, "weight_shards=2: needs layer_sharding="),
        (
            {"topology": TP_8, "flashcomm2": 2, "layer_sharding": ("o_proj",), "weight_shards": 4},
            "weight_shards=4: must be None or the same as flashcomm2=2",
        ),
        (
            {"topology": TP_8, "layer_sharding": ("o_proj",), "weight_shards": 3},
            r"weight_shards=3: must divide tensor_parallel=8",
        ),
        ({"topology": TP_8, "pd_tp_ratio": 3}, "pd_tp_ratio=3: must divide tensor_parallel=8"),
        ({"topology": TP_8, "pd_tp_ratio": 4, "pd_head_replicas": 8}, "pd_head_replicas=8: must divide pd_tp_ratio=4"),
        ({"topology": TP_8, "kv_role": "prefill"}, "kv_role='prefill': must be one of both, producer, consumer"),
        ({"topology": TP_8, "parallel": ("ep",)}, "parallel=.*must have no other names than tp, pcp, pp, dp"),
        ({"topology": TP_8, "hccl_buffsize_mb": 0}, "hccl_buffsize_mb=0"),
    ],
)
def test_rules_between_options(options, message):
    with pytest.raises(InvalidValueError, match=message) as caught:
        GroupConfig(**options)
    error = caught.value
    assert error.field in options
    assert error.value == options[error.field]
    again = pickle.loads(pickle.dumps(error))  # as between processes
    assert (str(again), again.fields) == (str(error), error.fields)


def test_an_error_is_phrased_anew_and_never_edited():
    """Words of a value that are names of fields as well stay as they are."""
    error = InvalidValueError("otp", "tp of /data/tp/otp", "must divide {tp}", tp=("{otp}", 4))
    assert str(error) == "otp='tp of /data/tp/otp': must divide tp=('{otp}', 4)"
    assert error.fields == {"otp", "tp"}
    assert error.phrased() == "option 'otp' ('tp of /data/tp/otp') must divide tp (('{otp}', 4))"
    renamed = error.renamed({"tp": "sizes.tp", "otp": "o"})
    assert renamed.phrased() == "option 'o' ('tp of /data/tp/otp') must divide sizes.tp (('{otp}', 4))"
    assert renamed.fields == {"sizes.tp", "o"}


@pytest.mark.parametrize("options", [{"mlp_tp": 2.0}, {"layer_sharding": "o_proj"}, {"parallel": ["tp"]}])
def test_wrong_types(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        GroupConfig(topology=DP_4, **options)
