# SPDX-License-Identifier: Apache-2.0
"""Which decoder layers have experts, by a model's config, against the models that transformers builds from it."""

import re
import warnings

import pytest
import torch
from vllm_ascend.deployment import Model
from vllm_ascend.moe_layers import ConfigReader, moe_layers, unknown_selectors, unreadable_selectors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = [
    "afmoe",
    "aria_text",
    "axk1",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "hy_v3",
    "jamba",
    "kimi_linear",
    "laguna",
    "llama4_text",
    "mellum",
    "mimo_v2_flash",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
]
ANOTHER_CHOICE = {
    "afmoe": {"num_dense_layers": 2},
    "deepseek_v3": {"first_k_dense_replace": 4},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 2},
    "glm4_moe": {"first_k_dense_replace": 2},
    "jamba": {"expert_layer_period": 3, "expert_layer_offset": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse", "dense"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "qwen2_moe": {"mlp_only_layers": [3], "decoder_sparse_step": 2},
    "qwen3_moe": {"mlp_only_layers": [0, 5]},
}


def layers_with_experts(config):
    """By the names of the parameters of the model that transformers builds, which has no memory for them."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config)
    found = (re.search(r"layers\.(\d+)\.(?!.*shared_expert).*experts?\.", name) for name, _ in model.named_parameters())
    return tuple(sorted({int(layer[1]) for layer in found if layer}))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_of_transformers(name):
    config = CONFIG_MAPPING[name]()
    assert moe_layers(ConfigReader(config)) == layers_with_experts(config) != ()
    assert unknown_selectors(ConfigReader(config)) == ()


@pytest.mark.parametrize("name", ANOTHER_CHOICE)
def test_values_other_than_the_defaults(name):
    extra = {"layer_types": ["full_attention"] * 6} if name == "laguna" else {}
    config = CONFIG_MAPPING[name](num_hidden_layers=6, **ANOTHER_CHOICE[name], **extra)
    wanted = layers_with_experts(config)
    assert 0 < len(wanted) < 6
    assert moe_layers(ConfigReader(config)) == wanted
    assert Model.of(config.to_dict()).moe_layer_ids == wanted  # a config.json


@pytest.mark.parametrize(
    ("told", "layers"),
    [
        ({"moe_layer_freq": [0, 1, 1, 0, 0, 1]}, (1, 2, 5)),
        ({"first_k_dense_replace": 2, "moe_layer_freq": 2}, (2, 4)),
        ({"moe_layers_enum": "2,4"}, (2, 4)),
        ({"moe_layers": [1, 3]}, (1, 3)),
        ({"hybrid_override_pattern": "M*EMEE"}, (2, 4, 5)),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe", "mamba", "moe"]}, (1, 3, 5)),
        ({"layers_block_type": ["mamba", "attention"] * 3}, (0, 1, 2, 3, 4, 5)),
        ({"moe_every_n_layers": 2}, (1, 3, 5)),
        ({"model_type": "step3p5"}, (1, 2, 3, 4, 5)),  # these begin with one dense layer where no key says otherwise
        ({"architectures": ["Step3TextForCausalLM"]}, (1, 2, 3, 4, 5)),
        ({"architectures": ["Param2MoEForCausalLM"]}, (1, 2, 3, 4, 5)),
        ({"architectures": ["Param2MoEForCausalLM"], "first_k_dense_replace": 0}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "sarvam_moe", "moe_layer_freq": 2}, (1, 3, 5)),  # counted from the first MoE layer
        ({"num_experts": 0}, ()),
        ({"num_experts": [0, 8, 8]}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_keys_of_vllm_alone(told, layers):
    assert moe_layers(ConfigReader({"num_hidden_layers": 6, "num_experts": 8, **told})) == layers


def test_a_key_that_is_not_known_is_named():
    config = {
        "num_hidden_layers": 6, "num_experts": 8, "expert_block_every": 3, "moe_layer_pattern": "-x-x", "moe_use_layer_norm": True,
        "moe_router_dtype": "float32", "shared_expert_intermediate_size": 64, "dense_layer_offset": None,
    }  # fmt: skip
    assert unknown_selectors(ConfigReader(config)) == ("expert_block_every", "moe_layer_pattern")
    assert Model.of(config).unknown_selectors == ("expert_block_every", "moe_layer_pattern")
    assert unknown_selectors(ConfigReader({**config, "num_experts": 0})) == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_layer_start_index", [1, 1]),  # ERNIE 4.5 VL: one for text, one for images
        ("first_k_dense_replace", "three"),
        ("moe_layer_end_index", {"last": 4}),
        ("num_dense_layers", True),
        ("decoder_sparse_step", 1.5),
        ("mlp_only_layers", 5),
        ("mlp_only_layers", ["a"]),
        ("moe_layers", [None]),
        ("moe_layers_enum", "4,x"),
        ("moe_layer_freq", [0, "x"]),
        ("mlp_layer_types", "dense"),
        ("hybrid_override_pattern", ["M", "E"]),
    ],
)
def test_a_known_key_with_a_value_of_another_form_is_named_and_not_guessed(key, value):
    config = {"num_hidden_layers": 6, "num_experts": 8, key: value}
    assert unreadable_selectors(ConfigReader(config)) == unknown_selectors(ConfigReader(config)) == (key,)
    assert moe_layers(ConfigReader(config)) == ()
    assert Model.of(config).unknown_selectors == (key,)
    assert unreadable_selectors(ConfigReader({**config, "num_experts": 0})) == ()


def test_a_key_with_a_value_for_each_layer():
    """Gemma 4's heads: transformers refuses to say one width for all of them."""
    from transformers import Gemma4TextConfig

    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma4TextConfig(**kinds, head_dim=64, global_head_dim=128, num_attention_heads=4)
    assert ConfigReader(config).get("head_dim") == [64, 128]
    assert ConfigReader(config).number("head_dim") == 0
    assert Model.of(config).attention_width == 0
    assert ConfigReader(config).get("num_attention_heads") == 4
