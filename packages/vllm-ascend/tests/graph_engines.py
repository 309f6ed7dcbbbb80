# SPDX-License-Identifier: Apache-2.0
"""`nox -s graphs`: captured decoding steps over more arrangements of ranks and options than the default tests have."""

import random
from itertools import pairwise

import pytest
import torch
from engine_jobs import BLOCK_BYTES, GREEDY, ONE_PROCESS, captured, tokens
from lora_adapters import ALL, make, side_by_side

INSPECTED = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
LENGTH = 16  # of answers of adapters


@pytest.fixture
def tiny_int8_moe(tmp_path):
    """A random Qwen3-MoE whose experts are int8."""
    from ascend_sim.checkpoints import quantise
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(4)
    config = Qwen3MoeConfig(
        vocab_size=500, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, head_dim=64,
        moe_intermediate_size=128, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, max_position_embeddings=256,
        tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).float().eval().save_pretrained(tmp_path / "float")
    quantise(tmp_path / "float", tmp_path / "int8", keep_float=("v_proj", "q_proj", "k_proj"))
    return tmp_path / "int8"


def test_three_ranks(smollm2, prompts, greedy, run_engines):
    job = {"engine": captured(smollm2, tensor_parallel_size=3), "runs": [{"prompts": prompts, "sampling": GREEDY}]}
    (result,) = run_engines([job | {"inspect": True}], **INSPECTED)
    assert tokens(result) == greedy
    assert len({counts["replays"] for counts in result["graphs"]}) == 1
    assert result["graphs"][0]["replays"] > 20


@pytest.mark.parametrize("options", [{"async_scheduling": False}, {"max_num_batched_tokens": 16}], ids=str)
def test_scheduling(options, smollm2, prompts, greedy, run_engines):
    job = {"engine": captured(smollm2, **options), "runs": [{"prompts": prompts, "sampling": GREEDY}]}
    (result,) = run_engines([job], **ONE_PROCESS)
    assert tokens(result) == greedy


def test_batches_above_the_largest_size(smollm2, prompts, greedy, run_engines):
    """Steps of more than two requests run operator by operator."""
    sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]}
    engine = captured(smollm2, compilation_config=sizes)
    (result,) = run_engines([{"engine": engine, "runs": [{"prompts": prompts, "sampling": GREEDY}]}], **ONE_PROCESS)
    assert tokens(result) == greedy


def test_preemption(smollm2, prompts, run_engines):
    """Room for 4 blocks of 128 tokens, and 8 requests that begin in one block each and grow into a second."""
    runs = [{"prompts": [(ids * 8)[:120] for ids in prompts], "sampling": GREEDY}]
    starved = captured(smollm2, max_model_len=256, kv_cache_memory_bytes=5 * BLOCK_BYTES)
    eager = captured(smollm2, compilation_config={"cudagraph_mode": "NONE"})
    starved, eager = run_engines([{"engine": starved, "runs": runs}, {"engine": eager, "runs": runs}], **ONE_PROCESS)
    assert starved["preemptions"] > 0
    assert tokens(starved) == tokens(eager)


def test_what_is_not_captured_runs_operator_by_operator(smollm2, prompts, greedy, run_engines):
    engine = captured(smollm2, enable_prompt_embeds=True)
    job = {"engine": engine, "runs": [{"prompts": prompts[:2], "sampling": GREEDY}], "inspect": True}
    (result,) = run_engines([job], **ONE_PROCESS, **INSPECTED)
    assert tokens(result) == greedy[:2]
    assert result["graphs"][0]["replays"] == 0


def test_a_thousand_steps_of_random_batches(tiny_qwen3, run_engines):
    """Requests of 1 to 59 new tokens for 8 places. Device memory after the first quarter of them and after all is the same, and so are the tokens of equal requests."""
    folder, prompts, expected = tiny_qwen3
    draw = random.Random(5)
    asked = [(draw.randrange(len(prompts)), draw.randint(1, 59)) for _ in range(400)]
    engine = captured(folder, max_model_len=256, skip_tokenizer_init=True, enable_prefix_caching=False)
    runs = [
        {"prompts": [prompts[which] for which, _ in part], "sampling": [GREEDY | {"detokenize": False, "max_tokens": length} for _, length in part]}
        for part in (asked[:100], asked[100:])
    ]  # fmt: skip
    (result,) = run_engines([{"engine": engine, "runs": runs, "inspect": True}], **ONE_PROCESS, **INSPECTED)
    assert result["graphs"][0]["replays"] > 1000
    for (which, length), found in zip(asked, tokens(result) + tokens(result, 1), strict=True):
        assert len(found) == length
        same = min(length, len(expected[which]))
        assert found[:same] == expected[which][:same]
    assert result["memory"][1] == result["memory"][2]


def test_int8_experts_over_mc2_as_operator_by_operator(tiny_int8_moe, run_engines):
    """Two ranks of an Atlas A3, bfloat16, in strict mode: MC2 and int8 products in graphs give the same bits."""
    asked = {"prompts": [[(17 * i * i + 5 * k) % 500 for i in range(20 + 8 * k)] for k in range(6)], "sampling": GREEDY | {"detokenize": False, "logprobs": 0}}  # fmt: skip
    options = {"dtype": "bfloat16", "tensor_parallel_size": 2, "enable_expert_parallel": True, "skip_tokenizer_init": True, "max_model_len": 256}  # fmt: skip
    jobs = [
        {"engine": captured(tiny_int8_moe, **options, **more), "runs": [asked], "inspect": True}
        for more in ({}, {"enforce_eager": True})
    ]
    graphs, eager = run_engines(jobs, ASCEND_SIM_SOC="Ascend910_9391", ASCEND_SIM_STRICT="1", **INSPECTED)
    assert graphs["runs"] == eager["runs"]
    assert graphs["graphs"][0]["replays"] > 20
    assert eager["graphs"][0]["replays"] == 0
    assert "npu::npu_moe_distribute_dispatch_v2" in graphs["operators"][0]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"enable_matmul_allreduce": True, "weight_prefetch_config": {"enabled": True}}),
        (
            4,
            {
                "enable_flashcomm1": True,
                "flashcomm1_dense_threshold": 0,
                "flashcomm2_parallel_size": 2,
                "layer_sharding": ["o_proj"],
            },
        ),
    ],
    ids=["prefetch", "layer sharding"],
)
@pytest.mark.parametrize("streams", ["immediate", "lazy"])
def test_weights_that_come_ahead(streams, ranks, options, tiny_qwen3, run_engines):
    """Prompts in chunks beside decoding: steps that fetch for the next one, and captured ones that do not, in turns."""
    folder, prompts, expected = tiny_qwen3
    engine = captured(folder, max_num_batched_tokens=64, tensor_parallel_size=ranks, additional_config=options, skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4)  # fmt: skip
    runs = [{"prompts": share, "sampling": GREEDY | {"detokenize": False}} for share in (prompts, prompts[:2])]
    (result,) = run_engines(
        [{"engine": engine, "runs": runs, "inspect": True}], ASCEND_SIM_STREAMS=streams, **INSPECTED
    )
    assert tokens(result) == expected
    assert tokens(result, 1) == expected[:2]
    assert result["graphs"][0]["replays"] > 60
    assert ("npu::npu_prefetch" in result["operators"][0]) == (ranks == 2)
    assert (result["collectives"][0][0].get("broadcast_", 0) > 0) == (ranks == 4)


@pytest.fixture(scope="module")
def adapters(tiny_qwen3, hugging_face, tmp_path_factory):
    folder, prompts, _ = tiny_qwen3
    wanted = {"8": (8, ALL), "64": (64, ALL), "vocabulary": (16, ("down_proj", "embed_tokens", "lm_head"))}
    return make(tmp_path_factory.mktemp("adapters"), folder, prompts[:3], LENGTH, hugging_face, wanted)


@pytest.mark.parametrize(
    "ranks",
    [
        {},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2, "fully_sharded_loras": True},
    ],
    ids=str,
)
def test_adapters(ranks, adapters, tiny_qwen3, run_engines):
    """The tokens of merged weights, of rows of two adapters beside rows of the base model; then of the base model alone, whose steps have graphs of their own; of adapters that
    change places in the slots; and of those that were there before."""
    folder, prompts = tiny_qwen3[0], tiny_qwen3[1][:3]
    sampling = GREEDY | {"max_tokens": LENGTH, "detokenize": False}
    assert all(adapters.merged[name] == adapters.tokens[name] != adapters.tokens["base"] for name in adapters.folders)
    asked = [["base", "8", "vocabulary"], ["base"], ["64", "base", "8"], ["vocabulary", "base", "8"]]
    jobs = [side_by_side(adapters, prompts, names, sampling) for names in asked]
    runs = [run for run, _ in jobs]
    runs[2] |= {"before": [["drop_adapter", adapters.folders["8"]], ["load_adapter", adapters.folders["64"]]]}
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64, "max_model_len": 256, "skip_tokenizer_init": True}
    engine = captured(folder, **lora, **ranks)
    (result,) = run_engines(
        [{"engine": engine, "runs": runs, "inspect": True}], **INSPECTED, **({} if ranks else ONE_PROCESS)
    )
    assert [tokens(result, run) for run in range(len(jobs))] == [said for _, said in jobs]
    replays = [counts[0]["replays"] for counts in result["launched"]]
    assert all(after - before >= LENGTH - 1 for before, after in pairwise(replays))
