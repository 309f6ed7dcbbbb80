# SPDX-License-Identifier: Apache-2.0
"""`eplb_config`: what it checks before an engine starts, and what each rank makes of it."""

import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from ascend_comm import Topology
from ascend_eplb import Placement, checkpoint, expert_map, save_placement, spread
from ascend_linear import MoeLayers
from vllm_ascend.config import AscendConfig, EplbConfig
from vllm_ascend.deployment import Deployment, Model
from vllm_ascend.eplb.placement import ExpertPlacement, placement_of
from vllm_ascend.rules import check

MODEL = Model(moe=MoeLayers(routed_experts=8, layers=frozenset({1, 2, 4})), decoder_layers=5, experts_per_token=2)
DEPLOYMENT = Deployment(topology=Topology(4, 2, 1, 1, 2), data_parallel_asked=2, model=MODEL, expert_parallel=True)
LAYERS = len(MODEL.moe_layer_ids)


def shuffled(redundant=0, ranks=4, experts=8, layers=LAYERS, seed=0):
    """A placement in which nothing is where a layout would put it."""
    rng = np.random.default_rng(seed)
    base = spread(num_experts=experts, ranks=ranks, redundant=redundant, layers=layers)
    return Placement(np.stack([rng.permutation(experts)[layer] for layer in base.physical_to_logical]), experts)


def config(**eplb):
    return AscendConfig.of({"eplb_config": eplb})


def numbered(placement, layer_ids=MODEL.moe_layer_ids):
    return Placement(placement.physical_to_logical, placement.num_experts, layer_ids)


def seen(placement, rank, *, tp_size=2, **eplb):
    return ExpertPlacement(
        placement,
        options=EplbConfig(**eplb),
        decoder_layers=MODEL.decoder_layers,
        rank=rank,
        tp_size=tp_size,
        replica=rank // tp_size,
    )


@pytest.fixture
def logged(caplog, monkeypatch):
    """What the plugin logs, also where another test has let vLLM configure its logger."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level("INFO", logger="vllm.vllm_ascend")
    return caplog


def test_without_options_experts_lie_as_vllm_has_them():
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    placement = placement_of(EplbConfig(), DEPLOYMENT)
    assert placement.layers == LAYERS
    for rank in range(4):
        local, theirs, _ = determine_expert_map(ep_size=4, ep_rank=rank, global_num_experts=8)
        slots = seen(placement, rank).layer(4, 8)
        assert slots.placed.slots_per_rank == local
        assert slots.expert_map.tolist() == theirs.tolist()
        assert slots.log2phy is slots.routing_table is None


def test_without_expert_parallelism_one_rank_has_all():
    placement = placement_of(EplbConfig(), replace(DEPLOYMENT, expert_parallel=False))
    assert placement == numbered(spread(num_experts=8, ranks=1, layers=LAYERS))


@pytest.mark.parametrize(("layout", "build"), [("spread", spread), ("checkpoint", checkpoint)])
@pytest.mark.parametrize("redundant", [0, 4, 8])
def test_layouts(layout, build, redundant):
    placement = placement_of(EplbConfig(layout=layout, num_redundant_experts=redundant), DEPLOYMENT)
    assert placement == numbered(build(num_experts=8, ranks=4, redundant=redundant, layers=LAYERS))
    beyond = seen(placement, 3, layout=layout).layer(5, 8)  # a draft layer, say
    assert beyond.placed == build(num_experts=8, ranks=4, redundant=redundant)


@pytest.mark.parametrize("redundant", [0, 4])
def test_a_map_file_is_followed_layer_by_layer(tmp_path, redundant):
    written = shuffled(redundant)
    save_placement(written, tmp_path / "map.json")
    eplb = config(expert_map_path=str(tmp_path / "map.json")).eplb_config
    placement = placement_of(eplb, DEPLOYMENT)
    assert placement == numbered(written)
    for index, decoder_layer in enumerate(MODEL.moe_layer_ids):
        for rank in range(4):
            slots = seen(placement, rank).layer(decoder_layer, 8)
            assert np.array_equal(slots.placed.physical_to_logical[0], written.physical_to_logical[index])
            assert np.array_equal(slots.expert_map, expert_map(written, rank)[index])
            holds = slots.placed.physical_to_logical.ravel()
            assert np.array_equal(holds[slots.log2phy], np.arange(8))
            if redundant:
                assert all(np.array_equal(holds[row], np.arange(8)) for row in slots.routing_table)
                assert set(slots.routing_table.ravel()) == set(range(12))  # every replica is used
            else:
                assert slots.routing_table is None


def test_tokens_that_ranks_share_mean_the_same_slot_to_them():
    placement = placement_of(EplbConfig(num_redundant_experts=8), DEPLOYMENT)
    tables = [seen(placement, rank).layer(1, 8).routing_table for rank in range(4)]
    assert np.array_equal(tables[0], tables[1])  # one TP group
    assert np.array_equal(tables[2], tables[3])
    assert not np.array_equal(tables[0][0], tables[2][0])  # another replica's first token starts elsewhere


def test_layers_that_the_file_lacks_are_spread(tmp_path):
    save_placement(shuffled(4, layers=2), tmp_path / "map.json")
    placement = placement_of(EplbConfig(expert_map_path=str(tmp_path / "map.json")), DEPLOYMENT)
    assert np.array_equal(
        placement.physical_to_logical[2], spread(num_experts=8, ranks=4, redundant=4).physical_to_logical[0]
    )


def test_layers_with_another_number_of_experts_take_the_layout():
    slots = seen(numbered(shuffled(4)), 0).layer(1, 4)
    assert slots.placed == spread(num_experts=4, ranks=4, redundant=4)


DEEPSEEK_R1 = replace(MODEL, moe=replace(MODEL.moe, layers=frozenset(range(3, 61))), decoder_layers=61)


@pytest.mark.parametrize("name", ["map.json", "map.npz", "map.yaml"])
@pytest.mark.parametrize(
    ("first", "read_as"), [(0, "positions among the MoE layers 3-60"), (3, "numbers of decoder layers")]
)
def test_every_layer_of_a_file_reaches_its_decoder_layer(tmp_path, logged, name, first, read_as):
    """Files in the wild number the MoE layers 3 to 60 of DeepSeek-R1 so, or 0 to 57."""
    written = shuffled(4, layers=58)
    path = str(tmp_path / name)
    save_placement(numbered(written, tuple(range(first, first + 58))), path)
    deployment = replace(DEPLOYMENT, topology=Topology(8, 2, 2, 1, 2), model=DEEPSEEK_R1)  # two pipeline stages
    check(config(expert_map_path=path), deployment)
    assert [record.message for record in logged.records] == [
        f"eplb_config.expert_map_path {path!r}: its layer numbers {first}-{first + 57} are read as {read_as}"
    ]
    placement = placement_of(EplbConfig(expert_map_path=path), deployment)
    slots = seen(placement, 1, expert_map_path=path)
    assert len({layer.tobytes() for layer in written.physical_to_logical}) == 58
    for index in range(58):
        assert np.array_equal(
            slots.layer(3 + index, 8).placed.physical_to_logical[0], written.physical_to_logical[index]
        )


def test_what_file_and_model_lack_of_each_other_is_said_in_one_line(tmp_path, logged):
    path = str(tmp_path / "map.yaml")
    save_placement(numbered(shuffled(layers=2), (2, 4)), path)
    check(config(expert_map_path=path), DEPLOYMENT)
    (record,) = logged.records
    assert record.levelname == "WARNING"
    assert "it lacks decoder layers 1 of the model, which take the default placement" in record.message
    logged.clear()
    save_placement(numbered(shuffled(layers=5), (1, 2, 4, 5, 6)), path)
    check(config(expert_map_path=path), DEPLOYMENT)
    (record,) = logged.records
    assert record.levelname == "WARNING"
    assert "its layers 5-6 are not in the model and are not used" in record.message


@pytest.mark.parametrize(("decoder_layer", "experts"), [(3, 8), (0, 8), (1, 4)])
def test_with_a_file_no_layer_of_the_model_takes_a_default_in_silence(decoder_layer, experts):
    """A layer that the config does not tell, or not with so many experts, is an error; without a file it takes the layout."""
    with pytest.raises(
        ValueError,
        match=rf"'map.json'.*decoder layer {decoder_layer} has {experts} experts, .* 8 experts in decoder layers 1-2, 4 only",
    ):
        seen(numbered(shuffled()), 0, expert_map_path="map.json").layer(decoder_layer, experts)
    slots = seen(numbered(shuffled()), 0).layer(decoder_layer, experts)
    assert slots.placed == spread(num_experts=experts, ranks=4)


def test_draft_layers_take_the_default_beside_a_file():
    slots = seen(numbered(shuffled()), 0, expert_map_path="map.json").layer(MODEL.decoder_layers, 8)
    assert slots.placed == spread(num_experts=8, ranks=4)


def test_a_file_for_a_model_whose_moe_layers_are_unknown_is_refused(tmp_path):
    save_placement(shuffled(layers=1), tmp_path / "map.json")
    unknown = replace(DEPLOYMENT, model=replace(MODEL, moe=MoeLayers(routed_experts=8)))
    with pytest.raises(
        ValueError, match=r"map.json'\): vllm-ascend cannot tell which decoder layers of this model are MoE"
    ):
        check(config(expert_map_path=str(tmp_path / "map.json")), unknown)


def broken_files(folder):
    """name -> (placement file, what its error says)."""
    save_placement(shuffled(ranks=2), folder / "ranks.json")
    save_placement(shuffled(experts=12), folder / "more.json")
    save_placement(shuffled(experts=4), folder / "fewer.json")
    save_placement(shuffled(4), folder / "redundant.json")
    document = json.loads((folder / "redundant.json").read_text())
    devices = document["layer_list"][1]["device_list"]
    whole = list(devices[2]["device_expert"])
    devices[2]["device_expert"] = [whole[0], whole[0], whole[2]]
    (folder / "twice.json").write_text(json.dumps(document))
    save_placement(shuffled(), folder / "plain.json")
    document = json.loads((folder / "plain.json").read_text())
    for device in document["layer_list"][2]["device_list"]:
        device["device_expert"] = [6 if expert == 7 else expert for expert in device["device_expert"]]
    (folder / "missing.json").write_text(json.dumps(document))
    (folder / "torn.json").write_text('{"moe_layer_count": 3, "lay')
    (folder / "map.txt").write_text("")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "digits.json").write_text("9" * 5000)
    (folder / "deep.yaml").write_text("[" * 5000)
    (folder / "twice.yaml").write_text("num_slots: 1\nnum_slots: 1")
    (folder / "objects.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    )
    (folder / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (" + b" " * 6)
    return {
        "ranks.json": "holds 2 ranks",
        "more.json": "is not in 0..7",
        "fewer.json": "expert 4 and 3 more of 0..7 is on no device",
        "twice.json": "device_list[2].device_expert[1]: expert",
        "missing.json": "layer_list[2]: expert 7 of 0..7 is on no device",
        "torn.json": "torn.json",
        "map.txt": "a placement file ends in",
        "none.json": "No such file",
        "deep.json": "not JSON: nested too deeply",
        "digits.json": "not JSON: Exceeds the limit",
        "deep.yaml": "not YAML: nested too deeply",
        "twice.yaml": "not YAML: a mapping has the key 'num_slots' twice",
        "objects.npy": "not a NumPy file of plain arrays: Object arrays cannot be loaded",
        "header.npy": "not a NumPy file of plain arrays: ",
    }


def test_a_bad_map_file_is_one_clear_error(tmp_path):
    for name, message in broken_files(tmp_path).items():
        path = str(tmp_path / name)
        with pytest.raises(
            ValueError, match=f"'eplb_config.expert_map_path' .*{name}.* for 8 experts over 4 ranks"
        ) as error:
            check(config(expert_map_path=path), DEPLOYMENT)
        assert message in str(error.value), name


def test_layers_of_another_model_are_refused(tmp_path):
    one = shuffled()
    save_placement(Placement(one.physical_to_logical, 8, (10, 11, 12)), tmp_path / "map.json")
    with pytest.raises(
        ValueError, match=r"map.json.*layers 10-12 are neither .* decoder layers 1-2, 4, nor among their positions 0-2"
    ):
        check(config(expert_map_path=str(tmp_path / "map.json")), DEPLOYMENT)


@pytest.mark.parametrize(
    ("eplb", "change", "message"),
    [
        ({"num_redundant_experts": 4}, {"expert_parallel": False}, "num_redundant_experts' (4) needs enable_expert_parallel"),
        ({"expert_map_path": "map.json"}, {"expert_parallel": False}, "'map.json') needs enable_expert_parallel"),
        ({"num_redundant_experts": 4}, {"model": Model()}, "'eplb_config' ({'num_redundant_experts': 4}) needs a MoE model"),
        ({"num_redundant_experts": 3}, {}, "num_redundant_experts' (3): num_experts=8 + redundant=3 = 11 slots do not divide"),
        ({"num_redundant_experts": 28}, {}, "at most redundant=24"),
        ({}, {"model": replace(MODEL, moe=replace(MODEL.moe, routed_experts=6))}, "redundant=2 would"),
        ({}, {"round_robin_experts": True}, "expert_placement_strategy ('round_robin') is not supported"),
        ({"expert_load_record_path": "/nowhere/load.npz"}, {}, "('/nowhere/load.npz') must lie in a folder that exists"),
        ({"expert_load_record_path": "m.json", "expert_map_path": "./m.json"}, {}, "names the file of 'eplb_config.expert_map_path', which the record would replace"),
        ({"expert_load_record_path": "load.npz"}, {"topology": Topology(8, 2, 2, 1, 2)}, "needs pipeline_parallel_size 1, got 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(eplb, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(config(**eplb), replace(DEPLOYMENT, **change))


@pytest.mark.parametrize(
    ("eplb", "message"),
    [
        ({"layout": "random"}, "layout' ('random') must be one of spread, checkpoint"),
        ({"layout": "checkpoint", "expert_map_path": "map.json"}, "cannot be used with expert_map_path"),
        ({"expert_heat_collection_interval": 0}, "(0) must be 1 or more"),
        ({"expert_load_record_path": "load.csv"}, "('load.csv') must end in .jsonl, .npz, .npy or .json"),
        ({"expert_map_path": 3}, "'eplb_config.expert_map_path' (3) must be a text"),
        ({"num_redundant_experts": -1}, "a whole number, 0 or more"),
        ({"redundant": 2}, "unknown option 'redundant' (2); did you mean num_redundant_experts"),
        ({"dynamic_eplb": 1}, "'eplb_config.dynamic_eplb' (1) must be true or false"),
        ({"algorithm_execution_interval": 0}, "algorithm_execution_interval' (0) must be 1 or more"),
        ({"load_window": 0}, "load_window' (0) must be 1 or more"),
        ({"move_buffer_experts": 0}, "move_buffer_experts' (0) must be 1 or more"),
        (
            {"eplb_policy_type": 4},
            "eplb_policy_type' ('4') must be one of incremental, balanced, swift, deepseek, random, or a number",
        ),
        ({"eplb_policy_type": "flash"}, "0 (random), 1 (deepseek), 2 (swift), 3 (balanced)"),
        ({"eplb_policy_type": True}, "eplb_policy_type' (True) must be a text"),
        (
            {"eplb_heat_collection_stage": "decoding"},
            "eplb_heat_collection_stage' ('decoding') must be one of all, prefill, decode",
        ),
        ({"load_collection_phase": "none"}, "load_collection_phase' ('none') must be one of all, prefill, decode"),
        (
            {"load_collection_phase": "decode", "eplb_heat_collection_stage": "prefill"},
            "load_collection_phase' ('decode') is an older name of eplb_heat_collection_stage, which is 'prefill'; give one of them",
        ),
        ({"load_weighting": "last"}, "load_weighting' ('last') must be one of mean, decayed, peak"),
        ({"move_budget": 0}, "move_budget' (0) must be above 0 and at most 1"),
        ({"move_budget": 2}, "a number from 0 to 1"),
        ({"expert_map_record_path": "map.yaml"}, "expert_map_record_path' ('map.yaml') must end in .json"),
    ],
)
def test_values_that_no_model_could_have(eplb, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**eplb)


def test_what_asks_for_nothing_is_accepted():
    asked = {"dynamic_eplb": False, "expert_map_path": None, "eplb_policy_type": 1, "num_redundant_experts": 0}
    assert AscendConfig.of({"eplb_config": asked}).eplb_config.in_force == EplbConfig()
    check(config(**asked), replace(DEPLOYMENT, model=Model()))


@pytest.mark.parametrize(
    ("given", "policy"), [(0, "random"), (1, "deepseek"), (2, "swift"), (3, "balanced"), ("incremental", "incremental")]
)
def test_policies_have_names_and_public_numbers(given, policy):
    assert config(eplb_policy_type=given).eplb_config.eplb_policy_type == policy


def test_both_names_of_the_stage_are_read():
    assert EplbConfig().stage == "all"
    assert (
        EplbConfig(load_collection_phase="decode").stage
        == EplbConfig(eplb_heat_collection_stage="decode").stage
        == "decode"
    )


@pytest.mark.parametrize(
    ("eplb", "change", "message"),
    [
        ({}, {"model": Model()}, "'eplb_config' ({'dynamic_eplb': True}) needs a MoE model"),
        ({}, {"expert_parallel": False}, "'eplb_config.dynamic_eplb' (True) needs enable_expert_parallel"),
        ({}, {"topology": Topology(1)}, "'eplb_config.dynamic_eplb' (True) needs several ranks that share the experts, got 1"),
        ({}, {"topology": Topology(8, 2, 2, 1, 2)}, "'eplb_config.dynamic_eplb' (True) needs pipeline_parallel_size 1, got 2"),
        ({"expert_load_record_path": "load.npz"}, {}, "(True) cannot be used with expert_load_record_path ('load.npz')"),
        ({"expert_map_record_path": "/nowhere/map.json"}, {}, "('/nowhere/map.json') must lie in a folder that exists"),
        ({"dynamic_eplb": False, "expert_map_record_path": "map.json"}, {}, "expert_map_record_path' ('map.json') needs dynamic_eplb"),
    ],
)  # fmt: skip
def test_what_dynamic_balancing_needs(eplb, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(config(**{"dynamic_eplb": True, **eplb}), replace(DEPLOYMENT, **change))
    check(config(dynamic_eplb=True), DEPLOYMENT)


@pytest.mark.parametrize("redundant", [0, 4])
def test_a_layer_that_has_moved_has_maps_of_the_same_shapes(redundant):
    """So that they can be changed where they lie."""
    first = spread(num_experts=8, ranks=4, redundant=redundant, layers=2)
    options = EplbConfig(dynamic_eplb=True)
    here = ExpertPlacement(first, options=options, decoder_layers=0, rank=1, tp_size=1, replica=0)
    before = here.layer(0, 8)
    ids = np.random.default_rng(0).permutation(8).astype(np.int32)[first.physical_to_logical[:1]]
    after = here.moved(Placement(ids, 8))
    assert after.placed == Placement(ids, 8)
    assert not np.array_equal(after.expert_map, before.expert_map)
    for name in ("expert_map", "log2phy", "routing_table"):
        one, other = getattr(before, name), getattr(after, name)
        assert (one is None) == (other is None)
        assert one is None or one.shape == other.shape
    assert after.log2phy is not None
    fresh = ExpertPlacement(Placement(ids, 8), options=options, decoder_layers=0, rank=1, tp_size=1, replica=0).layer(
        0, 8
    )
    for name in ("expert_map", "log2phy", "routing_table"):
        assert np.array_equal(getattr(after, name), getattr(fresh, name))


def test_the_file_and_the_option_must_agree(tmp_path):
    save_placement(shuffled(4), tmp_path / "map.json")
    path = str(tmp_path / "map.json")
    check(config(expert_map_path=path, num_redundant_experts=4), DEPLOYMENT)
    with pytest.raises(ValueError, match=r"num_redundant_experts' \(8\) must be 0 or 4, as in the file"):
        check(config(expert_map_path=path, num_redundant_experts=8), DEPLOYMENT)
