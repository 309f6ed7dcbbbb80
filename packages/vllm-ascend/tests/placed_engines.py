# SPDX-License-Identifier: Apache-2.0
"""Jobs of `run_engine.py` with experts placed by `eplb_config`, a tiny model for them, and what their results must show."""

import hashlib

import numpy as np
from ascend_eplb import load_placement, spread

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


def tiny_model(folder, hugging_face):
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
    with torch.inference_mode():
        model = Qwen3MoeForCausalLM(config).float().eval()
        model.save_pretrained(folder)
        return folder, prompts, hugging_face(model, prompts, TOKENS)


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
