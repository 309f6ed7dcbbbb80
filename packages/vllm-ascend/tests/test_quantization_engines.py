# SPDX-License-Identifier: Apache-2.0
"""Engines on W8A8 checkpoints, in bfloat16 and strict mode: what the int8 kernels take. Real weights against Hugging Face's float32; tiny
random models against a model whose products are int8 arithmetic, on one rank and over two: log-probabilities may be as far from it as
the same arithmetic is whose other operations are in bfloat16 (`rounding.py`)."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine_jobs import ONE_PROCESS
from int8_models import PROMPTS, int8_model, quantise_statically
from rounding import assert_as_near, assert_caught, ensemble, errors, own_logprobs, prompt_logprobs

pytestmark = pytest.mark.slow
SMALL = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 256 << 20,
}
STRICT = {"ASCEND_SIM_STRICT": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
READ = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}
# Three texts whose perplexity is measured, and one that smoothing is calibrated with.
*TEXTS, CALIBRATION = (
    text.replace("\n", " ") for text in (Path(__file__).parent / "prose.txt").read_text().strip().split("\n\n")
)
ANSWER = 32  # tokens of each greedy answer
LINEAR, EXPERTS = "npu::npu_quant_matmul", "npu::npu_grouped_matmul"
DYNAMIC, STATIC, BETWEEN = "npu::npu_dynamic_quant", "npu::npu_quantize", "npu::npu_dequant_swiglu_quant"


# Real weights


@pytest.fixture(scope="module")
def w8a8(models, smollm2):
    """Folders of SmolLM2 and of eight experts made of it, both W8A8 in all linear layers, smoothed before."""
    from ascend_sim.checkpoints import quantise, smooth, upcycle
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": CALIBRATION}], return_dict=False)
    dense = smooth(smollm2, models / "smollm2-smooth", texts=[tokenizer(CALIBRATION)["input_ids"], asked])
    experts = upcycle(dense, models / "smollm2-smooth-moe", experts=8, top_k=2)
    return quantise(dense, models / "smollm2-w8a8"), quantise(experts, models / "smollm2-moe-w8a8")


# Tiny random models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`Tiny` of: a Qwen2 (biases) with static scales, and a Qwen3-MoE with dynamic ones."""
    from ascend_sim.checkpoints import quantise
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common = {
        "vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.1,
    }  # fmt: skip
    qwen2 = Qwen2Config(**common)
    qwen3_moe = Qwen3MoeConfig(
        **common, head_dim=64, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True
    )
    made = {}
    for name, kind, config in (("static", Qwen2ForCausalLM, qwen2), ("experts", Qwen3MoeForCausalLM, qwen3_moe)):
        torch.manual_seed(4)
        source = tmp_path_factory.mktemp(name)
        model = kind(config).float().eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias"):
                    parameter.normal_()
        model.save_pretrained(source)
        folder = source / "w8a8"
        if name == "static":
            quantise_statically(model, source, folder, PROMPTS)
        else:
            quantise(source, folder, keep_float=("v_proj", "q_proj", "k_proj"))
        made[name] = Tiny(source, folder)
    return made


class Tiny:
    """A model and its W8A8 checkpoint: what int8 arithmetic says of the prompts exactly, and its errors in bfloat16 on one rank and on two."""

    def __init__(self, source, folder):
        self.source, self.folder = source, folder
        self.exact = own_logprobs(int8_model(source, folder).float(), PROMPTS)
        self.reference = {
            ranks: ensemble(int8_model(source, folder, ranks), self.exact, PROMPTS, parts=ranks) for ranks in (1, 2)
        }

    def assert_near(self, result, ranks, what):
        assert_as_near(errors(prompt_logprobs(result), self.exact), self.reference[ranks], what)


def job(tiny, **options):
    engine = {
        "model": str(tiny.folder),
        **SMALL,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 64 << 20,
        "skip_tokenizer_init": True,
        **options,
    }
    return {"engine": engine, "runs": [{"prompts": PROMPTS, "sampling": READ | {"detokenize": False}}], "inspect": True}


def check_real_text(result, exact, forced_exactly, what):
    """Perplexity within 2 % of float32's, which is what users accept of W8A8; and float32's own greedy answers are as often the first choice
    as in int8 arithmetic without other rounding."""
    forced = result["runs"][1]
    ours = prompt_logprobs(result)
    assert len(ours) == len(exact) > 600
    ratio = math.exp((exact.sum().item() - sum(ours)) / len(exact))
    first = [rank == 1 for output in forced for _, rank in output["prompt_tokens"][-ANSWER:]]
    print(f"{what} perplexity {ratio:.4f} times float32's; {sum(first)} of {len(first)} first choices")
    assert abs(ratio - 1) < 0.02
    lost = 1 - torch.tensor(first, dtype=torch.float32)
    assert_as_near(lost, forced_exactly[None], f"{what} first choices lost:")


def first_choices_lost(model, sequences):
    """1 for each of the last tokens of the sequences that is not the model's first choice, else 0."""
    with torch.inference_mode():
        chosen = [model(torch.tensor([ids])).logits[0, -ANSWER - 1 : -1].argmax(-1) for ids in sequences]
    wanted = torch.tensor([ids[-ANSWER:] for ids in sequences])
    return (torch.stack(chosen) != wanted).float().flatten()


@pytest.mark.long
def test_one_rank(models, smollm2, w8a8, prompts, greedy, tiny, run_engines):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    answered = [list(ids) + answer for ids, answer in zip(prompts, greedy, strict=True)]
    runs = [{"prompts": texts, "sampling": READ}, {"prompts": answered, "sampling": READ}]
    real = [{"engine": {"model": str(folder), **SMALL}, "runs": runs, "inspect": True} for folder in w8a8]
    static, experts = tiny["static"], tiny["experts"]
    *of_text, dense, moe = run_engines([*real, job(static), job(experts)], **STRICT, **ONE_PROCESS)
    exact = own_logprobs(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), texts)
    lost = first_choices_lost(int8_model(models / "smollm2-smooth", w8a8[0]).float(), answered)
    for result, what in zip(
        of_text, ("dense", "experts"), strict=True
    ):  # the experts are the dense MLP in other orders
        check_real_text(result, exact, lost, what)
    static.assert_near(dense, 1, "static scales:")
    experts.assert_near(moe, 1, "experts:")
    # Every projection was an int8 product. Operators are counted over the whole process, hence the differences.
    counts = [Counter(), *(Counter(result["operators"][0]) for result in (*of_text, dense, moe))]
    first, second, third, fourth = (after - before for before, after in pairwise(counts))
    assert first[LINEAR] == first[DYNAMIC] > 0
    assert first[LINEAR] % (4 * 30) == 0
    assert second[LINEAR] == second[EXPERTS] == 2 * second[BETWEEN] > 0
    assert third[LINEAR] == third[STATIC] > 0
    assert third[DYNAMIC] == 0
    assert fourth[EXPERTS] == 2 * fourth[BETWEEN] > 0


def test_two_ranks(tiny, run_engines):
    """Scales are cut with the output features, `quant_bias` is added once; FlashComm2 quantises before its exchange."""
    static, experts = tiny["static"], tiny["experts"]
    two = {"tensor_parallel_size": 2}
    options = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 0, "flashcomm2_parallel_size": 1}
    jobs = [job(static, **two), job(static, **two, additional_config=options)]
    jobs += [job(experts, **two), job(experts, **two, enable_expert_parallel=True)]
    results = run_engines(jobs, **STRICT)
    for result, wanted, what in zip(
        results, (static, static, experts, experts), ("TP", "FlashComm", "TP", "EP"), strict=True
    ):
        wanted.assert_near(result, 2, f"{what} over two ranks:")
    for result in results[:2]:
        assert all(operators[LINEAR] > 0 for operators in result["operators"])
    for result in results[2:]:
        assert all(operators[BETWEEN] > 0 for operators in result["operators"])


def test_int8_rows_travel_on_an_atlas_a3(tiny, run_engines):
    """By MC2, and where prompts are beyond its capacity by all-to-all-v; replicas among the slots."""
    experts = tiny["experts"]
    two = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    redundant = {"additional_config": {"eplb_config": {"num_redundant_experts": 4}}}
    jobs = [job(experts, **two, **redundant, max_num_seqs=512), job(experts, **two, **redundant)]
    by_mc2, by_all_to_all = run_engines(jobs, ASCEND_SIM_SOC="Ascend910_9391", **STRICT)
    for result, what in ((by_mc2, "MC2"), (by_all_to_all, "all-to-all-v")):
        experts.assert_near(result, 2, f"{what}:")
        assert all(operators[BETWEEN] > 0 for operators in result["operators"])
    assert all("npu::npu_moe_distribute_dispatch_v2" in operators for operators in by_mc2["operators"])
    assert all(calls["alltoall_base_"] > 0 for calls in by_all_to_all["collectives"][0])


def double_a_scale(layers):
    """A layer's scale of one output feature in eight, as after a mixed-up shard."""
    of = layers[0].self_attn.o_proj.of
    of["deq_scale" if "deq_scale" in of else "weight_scale"][::8] *= 2


def forget_the_bias(layers):
    """What the offset of a static scale adds, in one layer."""
    layers[0].mlp.down_proj.of["quant_bias"].zero_()


def swap_two_experts(layers):
    experts = layers[0].mlp.experts
    experts[0], experts[1] = experts[1], experts[0]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("static", double_a_scale),
        ("static", forget_the_bias),
        ("experts", double_a_scale),
        ("experts", swap_two_experts),
    ],
)
def test_the_bound_catches_a_wrong_model(tiny, name, spoil):
    """Int8 arithmetic beside bfloat16, spoilt in one layer, over two ranks: the wider of the two bounds."""
    model = int8_model(tiny[name].source, tiny[name].folder, parts=2)
    spoil(model.model.layers)
    found = errors(own_logprobs(model, PROMPTS), tiny[name].exact)
    assert_caught(found, tiny[name].reference[2], f"{name}, {spoil.__name__}:")
