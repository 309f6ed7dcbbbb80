# SPDX-License-Identifier: Apache-2.0
"""Experts where a Placement says, in running engines: tokens unchanged, deployed weights read back."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from ascend_eplb import balancedness, checkpoint, load_placement, read_loads, spread

pytestmark = pytest.mark.slow
TOKENS = 16
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
ENGINE = {
    "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 64 << 20,
    "tensor_parallel_size": 2, "enable_expert_parallel": True,
}  # fmt: skip
INSPECT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ATLAS_A3 = {"ASCEND_SIM_SOC": "Ascend910_9391"}


def run(engine, prompts, **eplb):
    return {
        "engine": engine | {"additional_config": {"eplb_config": eplb}},
        "runs": [{"prompts": prompts, "sampling": GREEDY | {"detokenize": False}}],
        "inspect": True,
        "experts": True,
    }


def tokens(result):
    return [output["tokens"] for output in result["runs"][0]]


def experts_of(folder):
    """A digest of each expert of each MoE layer of a checkpoint, `[L][E]`, as Hugging Face reads it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = [module for module in model.modules() if getattr(module, "gate_up_proj", None) is not None]
    return [
        [
            hashlib.sha256(w13.detach().numpy().tobytes() + w2.detach().numpy().tobytes()).hexdigest()
            for w13, w2 in zip(layer.gate_up_proj, layer.down_proj, strict=True)
        ]
        for layer in layers
    ]


def assert_deployed(result, placement, digests):
    """Every slot of every layer on every rank holds the expert that the placement names."""
    for rank, layers in enumerate(result["experts"]):
        assert layers == [
            [digests[layer][expert] for expert in placement.physical_to_logical[layer, rank]]
            for layer in range(placement.layers)
        ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, hugging_face):
    """A random Qwen3-MoE whose first layer is dense: folder, prompts, Hugging Face's tokens."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2, intermediate_size=96, moe_intermediate_size=32,
        num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[0],
    )  # fmt: skip
    prompts = [[(13 * i * i + 7 * k) % 500 for i in range(4 + 11 * k)] for k in range(4)]
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("placed")
    with torch.inference_mode():
        model = Qwen3MoeForCausalLM(config).float().eval()
        model.save_pretrained(folder)
        return folder, prompts, hugging_face(model, prompts, TOKENS)


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


MOVING = {
    "dynamic_eplb": True, "eplb_policy_type": "random", "expert_heat_collection_interval": 2, "algorithm_execution_interval": 1,
    "verify_moves": True,
}  # fmt: skip


def assert_moved(folder, record, result):
    """The placement that was written at the end is not the first one, and every slot of every rank holds its expert."""
    placement = load_placement(record, ranks=2, num_experts=8)
    first = spread(num_experts=8, ranks=2, redundant=placement.redundant, layers=2)
    assert not np.array_equal(placement.physical_to_logical, first.physical_to_logical)
    assert_deployed(result, placement, experts_of(folder))
    first, second = result["rebalances"]
    assert first["rebalances"] == second["rebalances"] >= 5
    assert first["moves"] == second["moves"] > 0


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
