# SPDX-License-Identifier: Apache-2.0
"""The options for linear layers in whole engines: greedy tokens in float32 equal Hugging Face's, and each option does what it is for."""

import pytest

pytestmark = pytest.mark.slow
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "detokenize": False}
SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}
INSPECT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def tokens(result, run=0):
    return [output["tokens"] for output in result["runs"][run]]


def ops(result, rank=0):
    """Last component of the path -> op, of one worker."""
    return {path.rpartition(".")[2]: op for path, (op, _, _) in result["layers"][rank].items()}


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory, hugging_face):
    """A random Qwen3 of 4 layers, prompts of 5 to 59 tokens, and Hugging Face's greedy tokens for them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen3")
    prompts = [[(7 * i * i + 3 * k) % 512 for i in range(5 + 9 * k)] for k in range(7)]
    with torch.inference_mode():
        model = Qwen3ForCausalLM(config).float().eval()
        model.save_pretrained(folder)
        return folder, prompts, hugging_face(model, prompts, GREEDY["max_tokens"])


def collectives(result, run, rank=0):
    """Calls of each collective in one run of one worker."""
    before = result["collectives"][run - 1][rank] if run else {}
    return {name: count - before.get(name, 0) for name, count in result["collectives"][run][rank].items()}


def test_two_ranks(tiny_qwen3, run_engines):
    """FlashComm1 with FlashComm2: prompts in chunks of 64 tokens beside decoding, which alone stays under the threshold of 20; then the
    product fused with the all-reduce, and weight prefetch."""
    folder, prompts, expected = tiny_qwen3
    split = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 20, "flashcomm2_parallel_size": 1}
    fused = {"enable_matmul_allreduce": True, "weight_prefetch_config": {"enabled": True}}
    engine = {"model": str(folder), **SMALL, "max_num_batched_tokens": 64, "tensor_parallel_size": 2}
    runs = [{"prompts": prompts, "sampling": GREEDY}, {"prompts": prompts[:1], "sampling": GREEDY}]
    split, fused = run_engines(
        [{"engine": engine | {"additional_config": options}, "runs": runs, "inspect": True} for options in (split, fused)],
        **INSPECT,
    )
    for result in (split, fused):
        assert tokens(result) == expected
        assert tokens(result, 1) == expected[:1]
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


def test_four_ranks(tiny_qwen3, run_engines):
    """Two shards of o_proj under FlashComm2, streamed (layer sharding), with FlashComm1 in every step; then pipeline stages with FlashComm1."""
    folder, prompts, expected = tiny_qwen3
    split = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 0}
    streamed = split | {"flashcomm2_parallel_size": 2, "layer_sharding": ["o_proj"]}
    engine = {"model": str(folder), **SMALL}
    runs = [{"prompts": prompts, "sampling": GREEDY}]
    tp, pp = run_engines(
        [
            {"engine": engine | {"tensor_parallel_size": 4, "additional_config": streamed}, "runs": runs, "inspect": True},
            {
                "engine": engine | {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "additional_config": split},
                "runs": runs,
                "inspect": True,
            },
        ],
        **INSPECT,
    )
    assert tokens(tp) == expected
    assert tokens(pp) == expected
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
    """Real weights: prompts whose tokens no multiple of three ranks are, together above the threshold and one by one below it."""
    options = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 64}
    engine = {
        "model": str(smollm2), **SMALL, "max_num_batched_tokens": 128, "skip_tokenizer_init": False, "kv_cache_memory_bytes": 256 << 20,
        "tensor_parallel_size": 3, "additional_config": options,
    }  # fmt: skip
    sampling = GREEDY | {"detokenize": True}
    runs = [{"prompts": prompts, "sampling": sampling}, {"prompts": prompts[1:2], "sampling": sampling}]
    (result,) = run_engines([{"engine": engine, "runs": runs, "inspect": True}], **INSPECT)
    expected = [answer[: GREEDY["max_tokens"]] for answer in greedy]
    assert tokens(result) == expected
    assert tokens(result, 1) == expected[1:2]
    assert collectives(result, 0)["_reduce_scatter_base_"] > 0
    assert collectives(result, 1)["_reduce_scatter_base_"] == 0
