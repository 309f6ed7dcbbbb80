# SPDX-License-Identifier: Apache-2.0
"""The options for linear layers in whole engines: greedy tokens in float32 equal Hugging Face's, and each option does what it is for."""

import pytest
import torch
from ascend_comm import Topology
from engine_jobs import tokens
from rounding import assert_as_near, assert_caught, errors, in_bfloat16, load, own_logprobs, prompt_logprobs
from vllm_ascend.config import AscendConfig
from vllm_ascend.explain import explain
from vllm_ascend.models import read_config

pytestmark = pytest.mark.slow
TOKENS = 12
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}
# Forked workers need not import everything again, which is most of an engine's start. (Spawned ones are the default; other tests have them.)
INSPECT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}


def ops(result, rank=0):
    """Last component of the path -> op, of one worker."""
    return {path.rpartition(".")[2]: op for path, (op, _, _) in result["layers"][rank].items()}


def collectives(result, run, rank=0):
    """Calls of each collective in one run of one worker."""
    before = result["collectives"][run - 1][rank] if run else {}
    return {name: count - before.get(name, 0) for name, count in result["collectives"][run][rank].items()}


def check_explained(result, model, options, dp=1, pp=1, tp=1, first_rank=0, **more):
    """`explain` says of every worker's layers what the engine has: op, ranks, bytes. (Routers are layers of another class in vLLM.)"""
    for local, found in enumerate(result["layers"]):
        rows = explain(
            read_config(model), AscendConfig.of(options), Topology(dp * pp * tp, dp, pp, 1, tp), rank=first_rank + local,
            dtype="float32", **more,
        )  # fmt: skip
        expected = {row.path: row for row in rows if "embed_tokens" not in row.path and row.path != "lm_head"}
        assert set(found) == {path for path in expected if not path.endswith("mlp.gate")}
        streamed = "layer_sharding" in options
        for path, (op, ranks, size) in found.items():
            assert op == (expected[path].op or "NoneType")
            assert ranks is None or tuple(ranks) == expected[path].ranks
            assert (streamed and path.endswith("o_proj")) or size == expected[path].weight_bytes


def test_two_ranks(tiny_qwen3, tiny_moe, run_engines):
    """FlashComm1 with FlashComm2: prompts in chunks of 64 tokens beside decoding, which alone stays under the threshold of 20; then the
    product fused with the all-reduce, and weight prefetch; then FlashComm1 of a MoE model, whose shared experts split the tokens."""
    split = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 20, "flashcomm2_parallel_size": 1}
    fused = {"enable_matmul_allreduce": True, "weight_prefetch_config": {"enabled": True}}
    moe = {"enable_flashcomm1": True, "enable_shared_expert_dp": True}
    jobs = []
    for (folder, prompts, _), options in ((tiny_qwen3, split), (tiny_qwen3, fused), (tiny_moe, moe)):
        engine = {
            "model": str(folder), **SMALL, "max_num_batched_tokens": 64, "tensor_parallel_size": 2, "additional_config": options,
            "enable_expert_parallel": options is moe,
        }  # fmt: skip
        runs = [{"prompts": prompts, "sampling": GREEDY}, {"prompts": prompts[:1], "sampling": GREEDY}]
        jobs.append({"engine": engine, "runs": runs, "inspect": True})
    results = run_engines(jobs, **INSPECT)
    for result, (folder, _, expected), options in zip(
        results, (tiny_qwen3, tiny_qwen3, tiny_moe), (split, fused, moe), strict=True
    ):
        expected = [answer[:TOKENS] for answer in expected]
        assert tokens(result) == expected
        assert tokens(result, 1) == expected[:1]
        check_explained(result, str(folder), options, tp=2, expert_parallel=options is moe)
    split, fused, moe = results
    assert ops(split) == {
        "qkv_proj": "SequenceColumnParallelOp",
        "o_proj": "Flashcomm2OProjRowParallelOp",
        "gate_up_proj": "SequenceColumnParallelOp",
        "down_proj": "SequenceRowParallelOp",
    }
    assert collectives(split, 0)["_reduce_scatter_base_"] > 0
    assert collectives(split, 1)["_reduce_scatter_base_"] == 0  # 5 tokens, then one at a time
    assert ops(fused)["o_proj"] == ops(fused)["down_proj"] == "MatmulAllreduceRowParallelOp"
    assert ops(fused)["qkv_proj"] == "NoneType"
    assert {"npu::npu_mm_all_reduce_base", "npu::npu_prefetch"} <= set(fused["operators"][0])
    rows = [path for path in fused["layers"][0] if path.endswith(("o_proj", "down_proj"))]
    assert collectives(fused, 1)["npu_mm_all_reduce_base"] == len(
        rows
    )  # the prompt; what decodes has the plain all-reduce
    assert collectives(moe, 1)["_reduce_scatter_base_"] > 0  # a MoE model has no threshold
    shared = {path: found for path, found in moe["layers"][1].items() if "shared_expert." in path}
    assert {op for op, _, _ in shared.values()} == {"NoneType"}
    assert {size for _, _, size in shared.values()} == {64 * 128 * 4, 2 * 64 * 128 * 4}  # whole


def test_fused_product_and_reduce_scatter(tiny_qwen3, run_engines):
    """FlashComm1 in bfloat16, where the two are one kernel: log-probabilities of the prompts, as near to float32's as bfloat16 is in two parts."""
    folder, prompts, _ = tiny_qwen3
    options = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 0}
    engine = {
        "model": str(folder), **SMALL, "dtype": "bfloat16", "tensor_parallel_size": 2, "additional_config": options,
    }  # fmt: skip
    runs = [{"prompts": prompts, "sampling": GREEDY | {"max_tokens": 1, "prompt_logprobs": 0}}]
    (result,) = run_engines([{"engine": engine, "runs": runs, "inspect": True}], ASCEND_SIM_STRICT="1", **INSPECT)
    exact, reference = in_bfloat16(folder, prompts, parts=2)
    assert_as_near(errors(prompt_logprobs(result), exact), reference, "FlashComm1 in bfloat16:")
    assert "npu::npu_mm_reduce_scatter_base" in result["operators"][0]
    model = load(folder)
    with torch.inference_mode():
        # Rows of the down projection that went to the other rank.
        weight = model.model.layers[0].mlp.down_proj.weight.data
        weight[:, :8], weight[:, 64:72] = weight[:, 64:72].clone(), weight[:, :8].clone()
    assert_caught(errors(own_logprobs(model, prompts), exact), reference, "swapped neurons in one layer:")


def test_four_ranks(tiny_qwen3, run_engines):
    """Two shards of o_proj under FlashComm2, streamed (layer sharding), with FlashComm1 in every step; then pipeline stages with FlashComm1."""
    folder, prompts, expected = tiny_qwen3
    split = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 0}
    streamed = split | {"flashcomm2_parallel_size": 2, "layer_sharding": ["o_proj"]}
    engine = {"model": str(folder), **SMALL}
    runs = [{"prompts": prompts, "sampling": GREEDY}]
    tp, pp = run_engines(
        [
            {
                "engine": engine | {"tensor_parallel_size": 4, "additional_config": streamed},
                "runs": runs,
                "inspect": True,
            },
            {
                "engine": engine
                | {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "additional_config": split}
                | {"enable_prompt_embeds": True},  # the model is then called with embeddings, also of tokens
                "runs": runs,
                "inspect": True,
            },
        ],
        **INSPECT,
    )
    assert tokens(tp) == tokens(pp) == [answer[:TOKENS] for answer in expected]
    check_explained(tp, str(folder), streamed, tp=4)
    check_explained(pp, str(folder), split, pp=2, tp=2)
    assert ops(tp)["qkv_proj"] == "Flashcomm2OshardQKVParallelOp"
    assert ops(tp)["o_proj"] == "Flashcomm2OProjRowParallelOp"
    whole = 256 * 64 * 4 // 2  # bytes of a shard of o_proj
    for rank in range(4):  # 4 layers over groups of 2 ranks: each keeps every other one
        held = [size for path, (_, _, size) in tp["layers"][rank].items() if path.endswith("o_proj")]
        assert held == ([whole, 0, whole, 0] if rank % 2 == 0 else [0, whole, 0, whole])
    assert collectives(tp, 0)["broadcast_"] > 0
    assert [len(layers) for layers in pp["layers"]] == [8, 8, 8, 8]
    assert collectives(pp, 0)["_reduce_scatter_base_"] > 0


def test_smollm2_over_three_ranks(smollm2, prompts, greedy, run_engines):
    """Real weights: tokens that are no multiple of three ranks, together above FlashComm1's threshold and one prompt alone below it."""
    options = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 64, "flashcomm2_parallel_size": 1}
    options |= {"weight_prefetch_config": {"enabled": True}}
    engine = {
        "model": str(smollm2), **SMALL, "max_num_batched_tokens": 128, "skip_tokenizer_init": False, "kv_cache_memory_bytes": 256 << 20,
        "tensor_parallel_size": 3, "additional_config": options,
    }  # fmt: skip
    sampling = GREEDY | {"detokenize": True}
    runs = [{"prompts": prompts, "sampling": sampling}, {"prompts": prompts[1:2], "sampling": sampling}]
    (result,) = run_engines([{"engine": engine, "runs": runs, "inspect": True}], **INSPECT)
    expected = [answer[:TOKENS] for answer in greedy]
    assert tokens(result) == expected
    assert tokens(result, 1) == expected[1:2]
    assert collectives(result, 0)["_reduce_scatter_base_"] > 0
    assert collectives(result, 1)["_reduce_scatter_base_"] == 0


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory, hugging_face):
    """A random Qwen2-MoE with a dense first layer and shared experts, prompts of 5 to 41 tokens, and Hugging Face's greedy tokens for them."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(1)
    config = Qwen2MoeConfig(
        vocab_size=500, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=64, mlp_only_layers=[0], norm_topk_prob=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen2_moe")
    prompts = [[(11 * i * i + 5 * k) % 500 for i in range(5 + 9 * k)] for k in range(5)]
    with torch.inference_mode():
        model = Qwen2MoeForCausalLM(config).float().eval()
        model.save_pretrained(folder)
        return folder, prompts, hugging_face(model, prompts, TOKENS)


def test_layers_over_data_parallel_ranks(tiny_moe, run_replicas):
    """Two replicas share o_proj, dense MLPs, embedding and LM head. One has less to do, and goes on with dummy batches for the other."""
    folder, prompts, expected = tiny_moe
    names = ("oproj", "mlp", "lmhead", "embedding")
    options = {"finegrained_tp_config": {f"{name}_tensor_parallel_size": 2 for name in names}}
    engine = {"model": str(folder), **SMALL, "additional_config": options}
    short = GREEDY | {"max_tokens": 3}
    runs = [
        [{"prompts": prompts[1:], "sampling": GREEDY}, {"prompts": prompts[:1], "sampling": short}],
        [{"prompts": prompts[:1], "sampling": short}, {"prompts": prompts[2:], "sampling": GREEDY}],
    ]
    (busy,), (idle,) = run_replicas([[{"engine": engine, "runs": own, "inspect": True}] for own in runs], **INSPECT)
    assert tokens(busy) == expected[1:]
    assert tokens(busy, 1) == [expected[0][:3]]
    assert tokens(idle) == [expected[0][:3]]
    assert tokens(idle, 1) == expected[2:]
    dense = {path.rpartition(".")[2]: op for path, (op, _, _) in busy["layers"][0].items() if "layers.0." in path}
    assert dense["o_proj"] == "OProjRowParallelOp"
    assert (dense["gate_up_proj"], dense["down_proj"]) == ("MLPColumnParallelOp", "MLPRowParallelOp")
    check_explained(busy, str(folder), options, dp=2)
    check_explained(idle, str(folder), options, dp=2, first_rank=1)
    for result in (busy, idle):
        sizes = {path: size for path, (_, _, size) in result["layers"][0].items()}
        assert sizes["model.layers.0.self_attn.o_proj"] == 128 * 128 * 4 // 2
        assert sizes["model.layers.0.mlp.down_proj"] == 96 * 128 * 4 // 2
