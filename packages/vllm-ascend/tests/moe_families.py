# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of DeepSeek-V2, DeepSeek-V3 and GLM4-MoE as checkpoints, with prompts and Hugging Face's tokens."""

import torch

TOKENS = 8
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 0.7,
}  # fmt: skip


def models_of_each_family():
    """Name -> a random model: without and with compressed queries, softmax and sigmoid, groups by their best and by their two best experts."""
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
    )

    common = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.2, "first_k_dense_replace": 1,
        "n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    }  # fmt: skip
    v2 = DeepseekV2Config(
        **common, **LATENT, q_lora_rank=None, num_key_value_heads=4, n_shared_experts=2, topk_method="group_limited_greedy", n_group=4,
        topk_group=2, norm_topk_prob=False, routed_scaling_factor=2.0,
    )  # fmt: skip
    v3 = DeepseekV3Config(
        **common, **LATENT, q_lora_rank=48, num_key_value_heads=4, n_shared_experts=1, topk_method="noaux_tc", scoring_func="sigmoid",
        n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, rope_parameters=YARN,
    )  # fmt: skip
    glm4 = Glm4MoeConfig(
        **common, num_key_value_heads=2, head_dim=64, attention_bias=True, use_qk_norm=True, n_shared_experts=1, n_group=1, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    yield "deepseek_v2", DeepseekV2ForCausalLM(v2)
    yield "deepseek_v3", DeepseekV3ForCausalLM(v3)
    yield "glm4_moe", Glm4MoeForCausalLM(glm4)


def made_families(new_folder, hugging_face):
    """Name -> folder, prompts and Hugging Face's tokens of each model.

    Args:
        new_folder: makes a folder of a name.
        hugging_face: `conftest.hugging_face_greedy`.
    """
    shared = [(5 * i * i + 3) % 500 for i in range(140)]
    prompts = [[*shared, 7, 9], [(13 * i * i + 5) % 500 for i in range(125)], [(17 * i * i + 1) % 500 for i in range(200)],
               [(11 * i * i + 2) % 500 for i in range(33)], [*shared, 8]]  # fmt: skip
    made = {}
    torch.manual_seed(3)
    with torch.inference_mode():
        for name, model in models_of_each_family():
            model = model.float().eval()
            for path, value in (*model.named_parameters(), *model.named_buffers()):
                if path.endswith(("e_score_correction_bias", "_proj.bias")):
                    value.normal_(0, 0.3)
            folder = new_folder(name)
            model.save_pretrained(folder)
            made[name] = folder, prompts, hugging_face(model, prompts, TOKENS)
    return made
