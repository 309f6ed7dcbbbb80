# SPDX-License-Identifier: Apache-2.0
"""How many operators a decoding step launches, and what runs before the first request. The counts depend on the program alone."""

import numpy as np
import pytest
from engine_jobs import one_step

BATCH = 8
ENGINE = {
    "max_model_len": 256, "max_num_seqs": BATCH, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 128 << 20, "skip_tokenizer_init": True,
}  # fmt: skip
EAGER = {"enforce_eager": True}
INSPECTED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
# What a layer may launch, and what a step may beside its layers.
DENSE_LAYER, MOE_LAYER, BESIDE = 11, 22, 25


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory):
    """A random Qwen3-MoE of 3 layers."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=256,
        tie_word_embeddings=False, mlp_only_layers=[],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen3moe")
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def runs(prompts):
    """Two that differ by one decoding step; one in which copies are watched."""
    sampling = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    lengths = [sampling | {"max_tokens": tokens} for tokens in (3, 4, 3)]
    return [{"prompts": prompts, "sampling": length, "watch": index == 2} for index, length in enumerate(lengths)]


def by_layer(step, layers):
    """Operators of a layer, and those beside layers: of an operator that is called a * layers + b times, a and b of them."""
    inside = {name: calls // layers for name, calls in step.items() if calls // layers}
    return inside, {name: calls % layers for name, calls in step.items() if calls % layers}


@pytest.mark.slow
def test_operators_of_a_decoding_step(smollm2, tiny_moe, prompts, run_engines):
    """SmolLM2 has 30 layers, so that no operator beside layers is taken for one of a layer; of the other model all layers count 3."""
    short = [[(7 * i * i + 3 * k) % 500 for i in range(5 + 2 * k)] for k in range(BATCH)]
    engines = [
        {"engine": ENGINE | {"model": str(model), "dtype": "float32"} | options, "runs": runs(short), "inspect": True}
        for model, options in ((smollm2, EAGER), (tiny_moe, EAGER), (smollm2, {}))
    ]
    dense, moe, captured = run_engines(engines, ASCEND_SIM_STRICT="0", **INSPECTED)

    layer, beside = by_layer(one_step(dense), 30)
    assert sum(layer.values()) <= DENSE_LAYER, layer
    assert sum(beside.values()) <= BESIDE, beside
    step = one_step(moe)
    assert sum(step.values()) <= 3 * MOE_LAYER + BESIDE, step
    for result in (dense, moe):
        assert result["blocking"] == [[]]
        warmed = result["calls"][0][0]  # before the first request
        layers = 30 if result is dense else 3
        assert warmed["npu::npu_fused_infer_attention_score"] >= 2 * layers  # a prompt and a decoding step
        assert warmed["npu::npu_scatter_pa_kv_cache"] >= 2 * layers
        assert warmed["aten::argmax"] >= 2
    step = one_step(captured, "launched")
    assert step["replays"] == 1
    assert step["updates"] == 30  # torch_npu gives the operators of a graph their lengths one by one
    assert step["launches"] - step["updates"] <= 1 + BESIDE, step


def test_slots_of_tokens():
    from vllm_ascend.step_inputs import slots

    table = np.array([[4, 9, 0], [1, 1, 1], [7, 2, 2**31 // 16 + 3]], dtype=np.int32)
    request, positions = np.array([0, 0, 0, 2, 2]), np.array([14, 15, 16, 0, 33])
    assert slots(table, request, positions, 16).tolist() == [
        4 * 16 + 14,
        4 * 16 + 15,
        9 * 16,
        7 * 16,
        2**31 + 3 * 16 + 1,
    ]


def test_the_split_of_a_projection_copies_and_all_else_is_as_of_any_tensor():
    import torch
    from ascend_sim.counters import counting
    from vllm_ascend.layers.linear import FusedProjection

    plain = torch.arange(48.0).view(4, 12).to("npu")
    fused = plain.as_subclass(FusedProjection)
    with torch.inference_mode(), counting() as work:
        parts = fused.split([6, 3, 3], dim=-1)
    assert work.delta.calls == 1
    for part, wanted in zip(parts, plain.split([6, 3, 3], dim=-1), strict=True):
        assert type(part) is torch.Tensor
        assert part.is_contiguous()
        assert torch.equal(part.cpu(), wanted.cpu())
    for sizes in (5, 12, [12]):
        assert [part.tolist() for part in fused.split(sizes, 1)] == [part.tolist() for part in plain.split(sizes, 1)]
    assert [part.tolist() for part in fused.chunk(3, -1)] == [part.tolist() for part in plain.chunk(3, -1)]
    rows = fused.split(3)
    assert [part.tolist() for part in rows] == [part.tolist() for part in plain.split(3)]
    assert all(type(x) is torch.Tensor for x in (*rows, fused + 1, fused.view(4, 3, 4), fused[:, 2:]))
