# SPDX-License-Identifier: Apache-2.0
"""Tokens of vLLM on the simulated NPU against Hugging Face transformers. float32 (relaxed mode) must be equal; bfloat16 (strict) as near to
float32 as Hugging Face's bfloat16 is."""

from pathlib import Path

import pytest
from engine_jobs import BLOCK_BYTES, GREEDY, ONE_PROCESS, SMALL, tokens
from rounding import assert_as_near, assert_caught, errors, in_bfloat16, load, own_logprobs, prompt_logprobs

pytestmark = pytest.mark.slow


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


TEXTS = [text.replace("\n", " ") for text in (Path(__file__).parent / "prose.txt").read_text().strip().split("\n\n")][
    :3
]


@pytest.fixture(scope="module")
def smollm2_in_bfloat16(smollm2):
    """The token ids of three texts, and what `in_bfloat16` says of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    return texts, *in_bfloat16(smollm2, texts)


def test_bfloat16_logprobs_in_strict_mode(smollm2, smollm2_in_bfloat16, run_engines):
    texts, exact, reference = smollm2_in_bfloat16
    engine = {"model": str(smollm2), **SMALL, "dtype": "bfloat16"}
    runs = [{"prompts": texts, "sampling": {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}}]
    (result,) = run_engines([{"engine": engine, "runs": runs}], ASCEND_SIM_STRICT="1", **ONE_PROCESS)
    assert_as_near(errors(prompt_logprobs(result), exact), reference, "SmolLM2 in bfloat16:")


def scale_attention(model):
    """5 % off, as after a head size of 58 for 64."""
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.05


def drop_a_residual(model):
    """The MLP of the last layer without its input beside it."""
    layer = model.model.layers[-1]
    inputs = []
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    layer.register_forward_hook(lambda _, arguments, output: output - inputs.pop())


def swap_two_heads(model):
    """In one layer of thirty, before o_proj; the last layer is where it changes least."""
    weight = model.model.layers[-1].self_attn.o_proj.weight.data
    weight[:, :128] = weight[:, :128].roll(64, dims=1)


@pytest.mark.parametrize("spoil", [scale_attention, drop_a_residual, swap_two_heads])
def test_the_bound_catches_a_wrong_model(smollm2, smollm2_in_bfloat16, spoil):
    """Hugging Face's own bfloat16, spoilt, on the first text alone."""
    import torch

    texts, exact, reference = smollm2_in_bfloat16
    model = load(smollm2)
    with torch.inference_mode():
        spoil(model)
    found = errors(own_logprobs(model, texts[:1]), exact[: len(texts[0]) - 1])
    assert_caught(found, reference[:, : len(found)], spoil.__name__)


@pytest.fixture(scope="module")
def padded_heads(tmp_path_factory, hugging_face):
    """Name -> folder, prompts and Hugging Face's tokens of random models: OPT, whose query is a view of a fused projection, with heads of 80 numbers, and
    Qwen3 with heads of 40."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

    common = {"vocab_size": 500, "num_hidden_layers": 3, "max_position_embeddings": 256}
    opt = OPTConfig(
        **common, hidden_size=320, ffn_dim=128, num_attention_heads=4, word_embed_proj_dim=320, init_std=0.1, dropout=0.0,
    )  # fmt: skip
    qwen3 = Qwen3Config(
        **common, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=40,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    prompts = [[2, *((7 * i * i + 3 * k) % 500 for i in range(20 + 25 * k))] for k in range(5)]
    made = {}
    torch.manual_seed(5)
    with torch.inference_mode():
        for name, model in (("opt", OPTForCausalLM(opt)), ("qwen3", Qwen3ForCausalLM(qwen3))):
            folder = tmp_path_factory.mktemp(name)
            model = model.float().eval()
            model.save_pretrained(folder)
            made[name] = folder, prompts, hugging_face(model, prompts, 32)
    return made


def test_padded_heads(padded_heads, run_engines):
    """In chunks of 32 tokens; and with blocks of 512 tokens."""
    sampling = {**GREEDY, "detokenize": False}
    engine = {**SMALL, "max_model_len": 256, "max_num_batched_tokens": 32, "skip_tokenizer_init": True}
    jobs = [
        {
            "engine": {"model": str(folder), **engine, **({"block_size": 512} if name == "qwen3" else {})},
            "runs": [{"prompts": prompts, "sampling": sampling}],
        }
        for name, (folder, prompts, _) in padded_heads.items()
    ]
    for result, (name, (_, _, expected)) in zip(run_engines(jobs, **ONE_PROCESS), padded_heads.items(), strict=True):
        assert tokens(result) == expected, name


def test_padded_heads_and_a_fused_projection_in_strict_mode(padded_heads, run_engines):
    """In bfloat16, where the kernel refuses a query that is not contiguous, and heads of 80 numbers."""
    folder, prompts, _ = padded_heads["opt"]
    engine = {"model": str(folder), **SMALL, "dtype": "bfloat16", "max_model_len": 256, "skip_tokenizer_init": True}
    sampling = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
    (result,) = run_engines(
        [{"engine": engine, "runs": [{"prompts": prompts, "sampling": sampling}]}], ASCEND_SIM_STRICT="1", **ONE_PROCESS
    )
    exact, reference = in_bfloat16(folder, prompts)
    assert_as_near(errors(prompt_logprobs(result), exact), reference, "OPT in bfloat16:")
