# SPDX-License-Identifier: Apache-2.0
"""Tokens of vLLM on the simulated NPU against Hugging Face transformers. float32 (relaxed mode) must be equal; bfloat16 (strict) close."""

import pytest

pytestmark = pytest.mark.slow
GREEDY = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
SMALL = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 256 << 20,
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
BLOCK_BYTES = 128 * 2 * 3 * 64 * 4 * 30  # tokens x (key, value) x heads x head size x float32 x layers


def tokens(result, run=0):
    return [output["tokens"] for output in result["runs"][run]]


def test_one_process(smollm2, prompts, greedy, run_engines):
    """Whole prompts; prompts in chunks of 16; a second time from the prefix cache; and with so few blocks that requests are preempted."""
    run = {"prompts": prompts, "sampling": GREEDY}
    long = {"prompts": [(ids * 8)[:300] for ids in prompts], "sampling": GREEDY}
    plain = {"engine": {"model": str(smollm2), **SMALL}, "runs": [run, long, long]}
    chunked = {"engine": {"model": str(smollm2), **SMALL, "max_num_batched_tokens": 16}, "runs": [run]}
    # Room for 4 blocks of 128 tokens, and 8 requests that begin in one block each and grow into a second.
    starved_prompts = [(ids * 8)[:120] for ids in prompts]
    starved = {
        "engine": {"model": str(smollm2), **SMALL, "max_model_len": 256, "kv_cache_memory_bytes": 5 * BLOCK_BYTES},
        "runs": [{"prompts": starved_prompts, "sampling": GREEDY}],
    }
    roomy = {"engine": {"model": str(smollm2), **SMALL}, "runs": starved["runs"]}
    plain, chunked, starved, roomy = run_engines([plain, chunked, starved, roomy], **ONE_PROCESS)
    assert tokens(plain) == greedy
    assert tokens(chunked) == greedy
    assert all(output["cached"] == 0 for output in plain["runs"][1])
    assert all(output["cached"] >= 256 for output in plain["runs"][2])
    assert tokens(plain, 1) == tokens(plain, 2)
    assert starved["preemptions"] > 0
    assert roomy["preemptions"] == 0
    assert tokens(starved) == tokens(roomy)


def test_spawned_engine_core(smollm2, prompts, greedy, run_engines):
    (result,) = run_engines(
        [{"engine": {"model": str(smollm2), **SMALL}, "runs": [{"prompts": prompts, "sampling": GREEDY}]}]
    )
    assert tokens(result) == greedy


def test_tensor_parallel_over_three_ranks(smollm2, prompts, greedy, run_engines):
    engine = {"model": str(smollm2), **SMALL, "tensor_parallel_size": 3}
    (result,) = run_engines([{"engine": engine, "runs": [{"prompts": prompts, "sampling": GREEDY}]}])
    assert tokens(result) == greedy


@pytest.mark.parametrize("parallel", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp2", "pp2"])
def test_tiny_qwen3_over_two_ranks(parallel, tiny_qwen3, run_engines):
    folder, prompts, expected = tiny_qwen3
    engine = {"model": str(folder), **SMALL, "max_model_len": 256, "skip_tokenizer_init": True, **parallel}
    sampling = {**GREEDY, "detokenize": False}
    (result,) = run_engines([{"engine": engine, "runs": [{"prompts": prompts[:3], "sampling": sampling}]}])
    assert tokens(result) == expected[:3]


def test_bfloat16_logprobs_in_strict_mode(smollm2, prompts, run_engines, hugging_face):
    """Teacher forcing on Hugging Face's bf16 tokens: the logprob of its top choice, against its own in float32 and in bf16.

    A bf16 logit between 16 and 32 moves in steps of 0.125, and Hugging Face's bf16 is up to 0.17 away from its float32 here. So we ask for
    less than 0.1 from float32, for less than 0.1 beyond its own error from bf16, and for no larger a mean error than it has.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
        answers = hugging_face(model, prompts, 32)
        sequences = [list(ids) + answer for ids, answer in zip(prompts, answers, strict=True)]
        rounded = [model(torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in sequences]
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        exact = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in sequences]
    engine = {"model": str(smollm2), **SMALL, "dtype": "bfloat16", "max_logprobs": 5}
    # One token after each prefix of the answer: its logprobs are those of the forced prefix.
    steps = [0, 1, 7, 15, 31]
    cut = [ids[: len(prompt) + step] for prompt, ids in zip(prompts, sequences, strict=True) for step in steps]
    runs = [{"prompts": cut, "sampling": {"temperature": 0, "max_tokens": 1, "logprobs": 5}}]
    (result,) = run_engines([{"engine": engine, "runs": runs}], ASCEND_SIM_STRICT="1", **ONE_PROCESS)
    outputs = iter(result["runs"][0])
    ours, theirs = [], []
    for prompt, reference, truth in zip(prompts, rounded, exact, strict=True):
        for step in steps:
            expected, token = reference[len(prompt) + step - 1].max(-1)
            got = next(outputs)["logprobs"][0][str(token.item())]
            true = truth[len(prompt) + step - 1, token].item()
            ours.append(abs(got - true))
            theirs.append(abs(expected.item() - true))
            assert ours[-1] < 0.1
            assert abs(got - expected.item()) < 0.1 + theirs[-1]
    assert sum(ours) <= sum(theirs)
