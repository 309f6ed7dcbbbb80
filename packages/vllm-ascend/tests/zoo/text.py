# SPDX-License-Identifier: Apache-2.0
"""Text models. Sizes are those of `entries.SIZES` but for what is said here."""

from dataclasses import replace

from zoo.entries import SIZES, Entry

# Head sizes are those of the published models where these are within reach: Phi 80, Gemma and GPT-J 256, the others 64.
MOE = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 96, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "num_key_value_heads": 4,
}  # fmt: skip
GROUPED = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    **MOE,
}
GPT = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 320}
WINDOW = {"sliding_window": 32}
# Small enough for the scores of random weights to feel it.
SOFT_CAP = {"attn_logit_softcapping": 0.1}
MAMBA2 = {"hidden_size": 256, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 64, "state_size": 16, "n_groups": 1}
ALTERNATING = {"num_hidden_layers": 4, **WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}

GEMMA4 = {"config": "Gemma4TextConfig", "head_dim": 256, **ALTERNATING, "vocab_size_per_layer_input": 512}


def rope(kind, theta=10000.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def text(prefix, causal=None, *, name=None, experts=False, ranks=2, known="", config=None, own_sizes=False, **sizes):
    """An entry whose classes begin with `prefix`."""
    sizes = sizes if own_sizes else {**SIZES, **sizes}
    return Entry(
        name=name or prefix, config=config or f"{prefix}Config", model=causal or f"{prefix}ForCausalLM", sizes=sizes, experts=experts, ranks=ranks,
        known=known,
    )  # fmt: skip


def moe(prefix, **options):
    return text(prefix, experts=True, **options)


def gpt(prefix, causal=None, name=None, **sizes):
    ids = {"vocab_size": SIZES["vocab_size"], "bos_token_id": 1, "eos_token_id": 2}
    return text(prefix, causal, name=name, own_sizes=True, **ids, **sizes)


TEXT = [
    text("Llama"),
    text("Llama", name="Llama, rope linear", **rope("linear", factor=2.0)),
    text("Llama", name="Llama, rope dynamic", **rope("dynamic", factor=2.0), max_position_embeddings=256),
    text("Llama", name="Llama, rope YaRN", **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    text(
        "Llama",
        name="Llama, rope llama3",
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    text("Mistral", **WINDOW),
    text(
        "Ministral3",
        **rope("yarn", factor=4.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.1),
        llama_4_scaling={"original_max_position_embeddings": 64, "beta": 0.1},
    ),
    moe("Mixtral", num_local_experts=8, num_experts_per_tok=2),
    text("Qwen2"),
    moe("Qwen2Moe", num_experts=8, shared_expert_intermediate_size=192, **MOE),
    text("Qwen3", head_dim=64),
    moe("Qwen3Moe", head_dim=64, num_experts=8, norm_topk_prob=True, **MOE),
    text("Gemma", head_dim=256, tie_word_embeddings=True),
    text("Gemma2", head_dim=64, **ALTERNATING, **SOFT_CAP),
    text("Gemma3", config="Gemma3TextConfig", head_dim=256, **ALTERNATING),
    text(
        "Gemma3n",
        config="Gemma3nTextConfig",
        head_dim=256,
        **ALTERNATING,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=32,
        laurel_rank=16,
        activation_sparsity_pattern=[0.0] * 4,
        known="vLLM's own implementation differs from transformers': its CPU build gives the same tokens as here.",
    ),
    text("Gemma4", **GEMMA4, hidden_size_per_layer_input=32),
    # As E2B: the last layers read the keys of earlier ones.
    text(
        "Gemma4",
        name="Gemma4, shared keys",
        **{**GEMMA4, "num_key_value_heads": 1},
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
    # As 26B-A4B: keys are values, of fewer heads in layers without a window, whose blocks so have as many tokens as others.
    moe(
        "Gemma4",
        name="Gemma4, experts",
        **GEMMA4,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=128,
    ),
    text("VaultGemma", head_dim=64, **ALTERNATING, **SOFT_CAP),
    text("Phi", hidden_size=320, num_key_value_heads=4, partial_rotary_factor=0.4),
    text("Phi3"),
    replace(
        moe(
            "Phimoe",
            attention_bias=True,
            lm_head_bias=True,
            num_local_experts=8,
            num_experts_per_tok=2,
            known="vLLM leaves the bias of its LM head out.",
        ),
        published="PhiMoEForCausalLM",
    ),
    text("Starcoder2"),
    text("StableLm", hidden_size=320, num_key_value_heads=4, partial_rotary_factor=0.25),
    gpt("GPT2", "GPT2LMHeadModel", **GPT),
    gpt(
        "GPTNeoX",
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        rotary_pct=0.25,
    ),
    gpt("GPTJ", **{**GPT, "n_embd": 512, "n_head": 2}, rotary_dim=64),
    gpt("GPTBigCode", **GPT, multi_query=True),
    gpt(
        "OPT",
        hidden_size=256,
        ffn_dim=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=256,
    ),
    gpt(
        "Falcon",
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        alibi=False,
        max_position_embeddings=512,
    ),
    replace(  # transformers' "eager" adds ALiBi's biases twice
        gpt("Falcon", name="Falcon, ALiBi", hidden_size=256, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        attention="sdpa",
    ),
    gpt("Bloom", hidden_size=256, n_layer=2, n_head=4),
    text("Cohere", logit_scale=1.0),
    text(
        "Cohere2",
        logit_scale=1.0,
        **ALTERNATING,
        known="vLLM's window is one token wider than transformers' for this model.",
    ),
    text("Olmo"),
    text("Olmo2"),
    text("Olmo3", **ALTERNATING),
    moe("Olmoe", num_experts=8, num_experts_per_tok=2),
    moe("FlexOlmo", num_experts=8, num_experts_per_tok=2),
    text("Granite", attention_multiplier=0.125, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=0.5),
    moe("GraniteMoe", num_local_experts=8, num_experts_per_tok=2, attention_multiplier=0.125),
    moe(
        "GraniteMoeShared",
        num_local_experts=8,
        num_experts_per_tok=2,
        shared_intermediate_size=192,
        attention_multiplier=0.125,
    ),
    text("Nemotron"),
    text("Glm", head_dim=64),
    text("Glm4", head_dim=64),
    moe("Glm4Moe", head_dim=64, use_qk_norm=True, **GROUPED),
    text("Exaone4", **ALTERNATING),
    text("Ernie4_5", head_dim=64),
    moe(
        "Ernie4_5_Moe",
        causal="Ernie4_5_MoeForCausalLM",
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=128,
    ),
    text("HunYuanDenseV1", head_dim=64),
    moe("HunYuanMoEV1", head_dim=64, num_experts=8, moe_topk=2),
    text("SmolLM3", num_hidden_layers=4),
    text("SeedOss", head_dim=64),
    text("MiniCPM3", **{**LATENT, "kv_lora_rank": 96, "qk_rope_head_dim": 32}),
    moe("DeepseekV2", **LATENT, **GROUPED, topk_method="group_limited_greedy"),
    moe("DeepseekV3", **LATENT, **GROUPED, topk_method="noaux_tc", scoring_func="sigmoid"),
    moe("Dots1", **{**GROUPED, "n_group": 1}, head_dim=64),
    moe(
        "Llama4",
        config="Llama4TextConfig",
        head_dim=64,
        num_hidden_layers=4,
        num_local_experts=8,
        num_experts_per_tok=1,
        intermediate_size_mlp=320,
        interleave_moe_layer_step=2,
        attention_chunk_size=128,
        no_rope_layers=[1, 1, 1, 0],
    ),
    text("Apertus"),
    text("Arcee"),
    moe(
        "MiniMaxM2",
        head_dim=64,
        rotary_dim=32,
        scoring_func="sigmoid",
        use_routing_bias=True,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    moe(
        "Afmoe",
        head_dim=64,
        score_func="sigmoid",
        route_norm=True,
        n_group=1,
        topk_group=1,
        **ALTERNATING,
        num_experts=8,
        num_shared_experts=1,
        **MOE,
    ),
    moe(
        "Laguna",
        head_dim=64,
        **ALTERNATING,
        num_experts=8,
        shared_expert_intermediate_size=128,
        **MOE,
        known="vLLM never loads the correction bias of its router; what is not loaded is refused here.",
    ),
    moe("GptOss", **ALTERNATING, head_dim=64, num_local_experts=8, num_experts_per_tok=2),
    moe("Qwen3Next", num_hidden_layers=4, head_dim=64, num_experts=8, shared_expert_intermediate_size=128, **MOE),
    # A block of the cache must hold a state: with this one a block has 128 tokens, and prompts come from the prefix cache.
    moe(
        "Qwen3Next",
        name="Qwen3Next, small state",
        num_hidden_layers=4,
        head_dim=64,
        num_experts=8,
        shared_expert_intermediate_size=128,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        **MOE,
    ),
    moe("Jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2),
    text("FalconH1", mamba_d_ssm=256, mamba_n_heads=4, mamba_d_head=64, mamba_d_state=16),
    moe(
        "GraniteMoeHybrid",
        layer_types=["mamba", "attention"],
        num_local_experts=8,
        num_experts_per_tok=2,
        shared_intermediate_size=128,
        mamba_n_heads=8,
    ),
    gpt("Mamba", hidden_size=256, num_hidden_layers=2, state_size=16),
    gpt("Mamba2", **MAMBA2),
    replace(gpt("Mamba2", name="Mamba2, prefix cache", **MAMBA2), engine={"enable_prefix_caching": True}),
]
