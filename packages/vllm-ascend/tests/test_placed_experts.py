# SPDX-License-Identifier: Apache-2.0
"""Experts where a Placement says, in running engines: tokens unchanged, deployed weights read back."""

import json
import subprocess
import sys

import pytest
from ascend_eplb import balancedness, checkpoint, load_placement, read_loads, spread
from placed_engines import (
    ATLAS_A3,
    ENGINE,
    INSPECT,
    MOVING,
    TOKENS,
    assert_deployed,
    assert_moved,
    experts_of,
    run,
    tiny_model,
    tokens,
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, hugging_face):
    """`tiny_model`."""
    return tiny_model(tmp_path_factory.mktemp("placed"), hugging_face)


@pytest.mark.parametrize("soc", [{}, ATLAS_A3], ids=["a2", "a3"])
def test_redundant_experts_in_both_layouts_change_no_token(tiny, run_engines, soc):
    folder, prompts, expected = tiny
    engine = ENGINE | {"model": str(folder), "skip_tokenizer_init": True}
    cases = [("spread", 2), ("checkpoint", 8)] if soc else [("checkpoint", 0), ("checkpoint", 2), ("spread", 8)]
    jobs = [run(engine, prompts, layout=layout, num_redundant_experts=redundant) for layout, redundant in cases]
    digests = experts_of(folder)
    for result, (layout, redundant) in zip(run_engines(jobs, **soc, **INSPECT), cases, strict=True):
        assert tokens(result) == expected, (layout, redundant)
        build = {"spread": spread, "checkpoint": checkpoint}[layout]
        assert_deployed(result, build(num_experts=8, ranks=2, redundant=redundant, layers=2), digests)


def test_experts_that_move_while_requests_run_change_no_token(tiny, run_engines, tmp_path):
    """Over TP ranks, with redundant experts; a plan at every chance, and a checksum of every slot after every change."""
    folder, prompts, expected = tiny
    engine = ENGINE | {"model": str(folder), "skip_tokenizer_init": True}
    record = tmp_path / "map.json"
    job = run(engine, prompts, num_redundant_experts=2, expert_map_record_path=str(record), **MOVING)
    (result,) = run_engines([job | {"runs": job["runs"] * 2, "rebalances": 5}], **INSPECT)
    for answers in result["runs"]:
        assert [output["tokens"] for output in answers] == expected
    assert_moved(folder, record, result)


@pytest.mark.long
def test_a_planned_map_of_recorded_load_changes_no_text(models, smollm2, prompts, greedy, run_replicas, tmp_path):
    """Real text of the upcycled model on two data parallel ranks: record, plan with the command line, deploy layer by layer."""
    from ascend_sim.checkpoints import upcycle

    folder = upcycle(smollm2, models / "smollm2-moe", experts=8, top_k=2)
    engine = ENGINE | {"model": str(folder), "max_num_batched_tokens": 512, "tensor_parallel_size": 1}
    recorded, planned = tmp_path / "load.npz", tmp_path / "map.json"
    shares = [slice(0, 3), slice(3, 8)]

    def both(**eplb):
        """The results of both ranks, which must have said what the dense model says."""
        results = [
            result for (result,) in run_replicas([[run(engine, prompts[share], **eplb)] for share in shares], **INSPECT)
        ]
        for result, share in zip(results, shares, strict=True):
            assert tokens(result) == [answer[:TOKENS] for answer in greedy[share]]
        return results

    both(expert_load_record_path=str(recorded), expert_heat_collection_interval=1)
    load = read_loads(recorded).sum(axis=0)
    assert load.shape == (30, 8)
    # Each prompt token once and all generated ones but the last, two experts each, in every layer; no step without requests counts.
    assert (load.sum(axis=1) == 2 * (sum(map(len, prompts)) + len(prompts) * (TOKENS - 1))).all()

    plan = ["plan", "--load", str(recorded), "--ranks", "2", "--slots", "10", "--output", str(planned)]
    subprocess.run([sys.executable, "-m", "ascend_eplb", *plan], check=True, timeout=1800)
    placement = load_placement(planned, ranks=2, num_experts=8)
    assert len({layer.tobytes() for layer in placement.physical_to_logical}) > 1  # not one map for all layers
    before = balancedness(spread(num_experts=8, ranks=2, layers=30), load)
    assert balancedness(placement, load).mean() > before.mean()
    results = both(expert_map_path=str(planned))
    deployed = {"experts": [result["experts"][0] for result in results]}
    assert_deployed(deployed, placement, experts_of(folder))


def test_a_bad_map_file_ends_the_engine_before_it_starts(tiny, tmp_path):
    """As a user sees it: one error that names the option, the file and the place in it, and no worker process."""
    folder, _, _ = tiny
    document = {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": [
        {"device_id": 0, "device_expert": [0, 1, 2, 3]}, {"device_id": 1, "device_expert": [4, 5, 6, 6]}]}]}  # fmt: skip
    (tmp_path / "map.json").write_text(json.dumps(document))
    options = json.dumps({"eplb_config": {"expert_map_path": str(tmp_path / "map.json")}})
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--additional-config", options]
    done = subprocess.run(
        [*serve, "--tensor-parallel-size", "2", "--enable-expert-parallel", "--skip-tokenizer-init"],
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "expert 6 is already in slot 2 of this device" in done.stdout + done.stderr
    assert "eplb_config.expert_map_path" in done.stdout + done.stderr
    assert "EngineCore" not in done.stdout + done.stderr
