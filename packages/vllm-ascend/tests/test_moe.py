# SPDX-License-Identifier: Apache-2.0
"""MoE models on ascend-moe's kernels: greedy tokens against Hugging Face transformers, float32."""

import pytest
import torch
from engine_jobs import one_step, tokens
from rounding import assert_as_near, assert_caught, errors, in_bfloat16, load, own_logprobs, prompt_logprobs

pytestmark = pytest.mark.slow
TOKENS = 16
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
}
KERNELS = {
    "npu::npu_moe_gating_top_k",
    "npu::npu_moe_init_routing_v2",
    "npu::npu_grouped_matmul",
    "npu::npu_moe_token_unpermute",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory, hugging_face):
    """Folder, prompts and Hugging Face's tokens of tiny random models: Qwen3-MoE and Mixtral."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common = {
        "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    qwen3 = Qwen3MoeConfig(
        **common,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    )
    mixtral = MixtralConfig(
        **common, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    )
    prompts = [[(13 * i * i + 7 * k) % 500 for i in range(4 + 11 * k)] for k in range(4)]
    made = {}
    for name, kind, config in (("qwen3_moe", Qwen3MoeForCausalLM, qwen3), ("mixtral", MixtralForCausalLM, mixtral)):
        torch.manual_seed(2)
        folder = tmp_path_factory.mktemp(name)
        with torch.inference_mode():
            model = kind(config).float().eval()
            model.save_pretrained(folder)
            made[name] = folder, prompts, hugging_face(model, prompts, TOKENS)
    return made


def job(families, **parallel):
    """A run of each model."""
    return [
        {
            "engine": {"model": str(folder), **SMALL, "skip_tokenizer_init": True, **parallel},
            "runs": [{"prompts": prompts, "sampling": GREEDY | {"detokenize": False}}],
            "inspect": True,
        }
        for folder, prompts, _ in families.values()
    ]


INSPECT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ATLAS_A3 = {"ASCEND_SIM_SOC": "Ascend910_9391"}  # there tokens travel by MC2, and by all-to-all-v where it has no room
MC2 = {"npu::npu_moe_distribute_dispatch_v2", "npu::npu_moe_distribute_combine_v2"}


def test_one_rank(families, run_engines):
    results = run_engines(job(families), **INSPECT)
    for result, (_, _, expected) in zip(results, families.values(), strict=True):
        assert tokens(result) == expected
        assert set(result["operators"][0]) >= KERNELS


# What one of two ranks launches in a decoding step by all-gather, in float32: in a layer, and beside the layers.
EP_LAYER, EP_BESIDE = 25, 41


@pytest.mark.parametrize("experts_apart", [False, True], ids=["tp2", "tp2-ep"])
def test_two_ranks(families, run_engines, experts_apart):
    """And with expert parallelism, without graphs, how many operators a decoding step has."""
    jobs = job(families, tensor_parallel_size=2, enable_expert_parallel=experts_apart, enforce_eager=experts_apart)
    for one in jobs:
        (run,) = one["runs"]
        one["runs"] = [run | {"sampling": run["sampling"] | {"max_tokens": count}} for count in (3, 4, TOKENS)]
    results = run_engines(jobs, **INSPECT)
    for result, (_, _, expected) in zip(results, families.values(), strict=True):
        assert tokens(result, 2) == expected
        assert not MC2 & set(result["operators"][0])
        if experts_apart:
            step = one_step(result)
            assert sum(step.values()) <= 3 * EP_LAYER + EP_BESIDE, step


def test_two_ranks_of_an_atlas_a3(families, run_engines):
    """MC2 has no float32: its decoding steps take all-to-all-v as its prefills do."""
    results = run_engines(job(families, tensor_parallel_size=2, enable_expert_parallel=True), **ATLAS_A3, **INSPECT)
    for result, (_, _, expected) in zip(results, families.values(), strict=True):
        assert tokens(result) == expected
        assert not MC2 & set(result["operators"][0])
        assert all(collectives["alltoall_base_"] for collectives in result["collectives"][0])


def test_mc2_in_bfloat16(families, run_engines):
    """Log-probabilities of prompts that MC2 has room for, in the simulator's strict mode, with and without replicas: as near to float32's as
    bfloat16 is, which sends some tokens to another expert."""
    options = {"dtype": "bfloat16", "max_num_seqs": 256, "tensor_parallel_size": 2, "enable_expert_parallel": True}
    redundant = {"additional_config": {"eplb_config": {"num_redundant_experts": 4, "layout": "checkpoint"}}}
    prompts = [[(17 * i * i + 5 * k) % 500 for i in range(20 + 8 * k)] for k in range(6)]
    engines = [*job(families, **options), *job(families, **options, **redundant)]
    for engine in engines:
        sampling = GREEDY | {"detokenize": False, "max_tokens": 1, "prompt_logprobs": 0}
        engine["runs"] = [{"prompts": prompts, "sampling": sampling}]
    results = run_engines(engines, **ATLAS_A3, **INSPECT, ASCEND_SIM_STRICT="1")
    for index, (name, (folder, _, _)) in enumerate(families.items()):
        exact, reference = in_bfloat16(folder, prompts, parts=2)
        for result, what in ((results[index], "MC2"), (results[index + 2], "MC2 with replicas")):
            assert set(result["operators"][0]) >= MC2
            assert_as_near(errors(prompt_logprobs(result), exact), reference, f"{name}, {what}:")
        model = load(folder)
        with torch.inference_mode():  # two experts that changed places, in one layer of three
            experts = model.model.layers[0].mlp.experts
            for weights in (experts.gate_up_proj.data, experts.down_proj.data):
                weights[:2] = weights[:2].flip(0)
        assert_caught(errors(own_logprobs(model, prompts), exact), reference, f"{name}, swapped experts:")


# Model, TP size of each replica, eplb_config; None: no expert parallelism, each rank has a shard of every expert.
REPLICAS = {
    "a2": [
        ("qwen3_moe", 1, {}),
        ("qwen3_moe", 1, None),
        ("qwen3_moe", 2, {}),
        ("mixtral", 2, {"num_redundant_experts": 4}),
    ],
    "a3": [
        ("qwen3_moe", 1, {"num_redundant_experts": 4}),
        ("qwen3_moe", 2, {"num_redundant_experts": 8, "layout": "checkpoint"}),
    ],
}


@pytest.mark.parametrize("chip", REPLICAS)
def test_data_parallel_ranks_share_the_experts(families, run_replicas, chip):
    """Each replica has requests of its own, of other lengths. With TP 2 vLLM splits the tokens of Qwen3's MoE layers over TP, and not Mixtral's."""
    shares = [slice(0, 1), slice(1, 4)]
    jobs = [[], []]
    for name, tp, options in REPLICAS[chip]:
        folder, prompts, _ = families[name]
        experts = {"enable_expert_parallel": options is not None, "additional_config": {"eplb_config": options}}
        (whole,) = job({name: (folder, prompts, None)}, tensor_parallel_size=tp, **experts)
        for replica, share in zip(jobs, shares, strict=True):
            replica.append(whole | {"runs": [whole["runs"][0] | {"prompts": prompts[share]}]})
    results = run_replicas(jobs, **(ATLAS_A3 if chip == "a3" else {}), **INSPECT)
    for replica, share in zip(results, shares, strict=True):
        for result, (name, *case) in zip(replica, REPLICAS[chip], strict=True):
            assert tokens(result) == families[name][2][share], (name, *case)
            assert ("alltoall_base_" in result["collectives"][0][0]) == (chip == "a3")


@pytest.mark.long
def test_upcycled_smollm2_writes_what_the_dense_model_writes(models, smollm2, prompts, greedy, run_engines):
    """Real text: eight experts that are the dense MLP in other orders, whatever the router says."""
    from ascend_sim.checkpoints import upcycle

    folder = upcycle(smollm2, models / "smollm2-moe", experts=8, top_k=2)
    engine = {"model": str(folder), **SMALL, "max_num_batched_tokens": 512}
    (result,) = run_engines(
        [{"engine": engine, "runs": [{"prompts": prompts, "sampling": GREEDY}]}], VLLM_ENABLE_V1_MULTIPROCESSING="0"
    )
    assert tokens(result) == [answer[:TOKENS] for answer in greedy]
