# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that ModelSlim has quantised: what their description may say. Engines on them are in test_quantization_engines.py."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter
from vllm_ascend.quantization.checks import check_loaded, check_symmetric
from vllm_ascend.quantization.description import Description

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
TENSORS = {
    "FLOAT": ("weight",),
    "W8A8": ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale"),
    "W8A8_DYNAMIC": ("weight", "weight_scale", "weight_offset"),
}
ATTENTION, MLP, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp.experts"
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")
SUPPORTED = (
    "vllm-ascend supports W8A8_DYNAMIC and W8A8 for linear layers, W8A8_DYNAMIC for experts, FLOAT for everything"
)


def described(kinds, **more):
    return {f"{layer}.{tensor}": kind for layer, kind in kinds.items() for tensor in TENSORS[kind]} | more


CONTENT = described(
    {
        **{f"{ATTENTION}.{name}": "W8A8" for name in ("q_proj", "k_proj", "v_proj")},
        f"{ATTENTION}.o_proj": "FLOAT",
        **{f"{MLP}.{name}": "W8A8_DYNAMIC" for name in PROJECTIONS},
        **{f"{EXPERTS}.{expert}.{name}": "W8A8_DYNAMIC" for expert in range(2) for name in PROJECTIONS},
        "lm_head": "FLOAT",
    },
    model_quant_type="W8A8_DYNAMIC", version="1.0.0", group_size=0, kv_quant_type=None, metadata={}, is_rot_used=False,
)  # fmt: skip


def test_types_of_layers():
    description = Description(CONTENT)
    assert description.linear(f"{ATTENTION}.qkv_proj", PACKED) == "W8A8"
    assert description.linear(f"{ATTENTION}.o_proj", PACKED) == "FLOAT"
    assert description.linear(f"{MLP}.gate_up_proj", PACKED) == "W8A8_DYNAMIC"
    assert description.linear(f"{MLP}.down_proj", PACKED) == "W8A8_DYNAMIC"
    assert description.experts(EXPERTS, PROJECTIONS, 2) == "W8A8_DYNAMIC"
    assert description.linear("lm_head", {}) == "FLOAT"
    description.check_float("lm_head")
    description.check_float("model.embed_tokens")  # not named: no layer of this kind is quantised


def test_names_follow_the_model():
    renamed = Description(CONTENT).renamed(lambda name: None if name == "lm_head.weight" else f"language_model.{name}")
    assert renamed.linear(f"language_model.{ATTENTION}.qkv_proj", PACKED) == "W8A8"
    with pytest.raises(ValueError, match="no type for"):
        renamed.linear("language_model.lm_head", {})


WRONG_CONTENTS = [
    ({f"{MLP}.up_proj.weight": "W4A8_DYNAMIC"}, f"'{MLP}.up_proj.weight' is of type 'W4A8_DYNAMIC'. {SUPPORTED}"),
    ({f"{MLP}.up_proj.weight": "W4A4_DYNAMIC", f"{MLP}.up_proj.weight_scale": "W4A4_DYNAMIC"}, "type 'W4A4_DYNAMIC' (and 1 more tensors)"),
    ({f"{ATTENTION}.k_proj.kv_cache_scale": "C8"}, f"'{ATTENTION}.k_proj.kv_cache_scale' is of type 'C8'"),
    ({"kv_quant_type": "C8"}, f"kv_quant_type='C8' is not supported. {SUPPORTED}"),
    ({"fa_quant_type": "FAQuant"}, "fa_quant_type='FAQuant' is not supported"),
    ({"reduce_quant_type": "per_channel"}, "reduce_quant_type='per_channel' is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), WRONG_CONTENTS)
def test_what_is_not_supported_is_named(more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Description(CONTENT | more)


def test_a_description_of_nothing_is_refused():
    with pytest.raises(ValueError, match="names no tensors"):
        Description({"model_quant_type": "W8A8"})


def without(name):
    return {key: kind for key, kind in CONTENT.items() if key != name}


def qkv(content):
    return Description(content).linear(f"{ATTENTION}.qkv_proj", PACKED)


def experts(content):
    return Description(content).experts(EXPERTS, PROJECTIONS, 2)


STATIC_EXPERTS = CONTENT | described({f"{EXPERTS}.{e}.{name}": "W8A8" for e in range(2) for name in PROJECTIONS})
WRONG_LAYERS = [
    (qkv, without(f"{ATTENTION}.k_proj.weight"), f"no type for '{ATTENTION}.k_proj.weight', of the model's layer '{ATTENTION}.qkv_proj'. {SUPPORTED}"),
    (qkv, without(f"{ATTENTION}.v_proj.deq_scale"), f"lacks '{ATTENTION}.v_proj.deq_scale', which type 'W8A8' of layer '{ATTENTION}.qkv_proj' needs"),
    (qkv, CONTENT | {f"{ATTENTION}.v_proj.weight": "FLOAT"}, f"parts of layer '{ATTENTION}.qkv_proj' must have one type, but '{ATTENTION}.q_proj' W8A8, '{ATTENTION}.v_proj' FLOAT"),
    (experts, without(f"{EXPERTS}.1.up_proj.weight"), f"no type for '{EXPERTS}.1.up_proj.weight', of the model's layer '{EXPERTS}'"),
    (experts, without(f"{EXPERTS}.0.down_proj.weight_scale"), f"lacks '{EXPERTS}.0.down_proj.weight_scale', which type 'W8A8_DYNAMIC'"),
    (experts, CONTENT | {f"{EXPERTS}.1.down_proj.weight": "FLOAT"}, f"'{EXPERTS}.0.gate_proj' W8A8_DYNAMIC, '{EXPERTS}.1.down_proj' FLOAT"),
    (experts, STATIC_EXPERTS, f"experts '{EXPERTS}' are of type 'W8A8'. {SUPPORTED}"),
    (lambda content: Description(content).check_float("lm_head"), CONTENT | {"lm_head.weight": "W8A8_DYNAMIC"}, "'lm_head' is of type 'W8A8_DYNAMIC'; embeddings and LM heads must be FLOAT"),
    (lambda content: Description(content).check_rms_norms(), CONTENT | {"model.layers.0.input_layernorm.bias": "FLOAT"}, "'model.layers.0.input_layernorm.bias' is the bias of an RMSNorm"),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "content", "message"), WRONG_LAYERS)
def test_a_layer_that_does_not_fit_is_named(ask, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ask(content)


def test_the_rms_norms_of_a_usual_checkpoint_are_fine():
    Description(CONTENT | {"model.norm.weight": "FLOAT", f"{ATTENTION}.q_proj.bias": "FLOAT"}).check_rms_norms()


def test_each_layer_gets_its_method():
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
    from vllm_ascend.quantization.config import AscendQuantizationConfig

    config = AscendQuantizationConfig()
    config._description = Description(CONTENT)
    config.packed_modules_mapping = PACKED

    def method(kind, prefix, **attributes):
        layer = object.__new__(kind)
        torch.nn.Module.__init__(layer)
        for name, value in attributes.items():
            setattr(layer, name, value)
        return type(config.get_quant_method(layer, prefix)).__name__

    names = {f"ckpt_{name}_name": name for name in PROJECTIONS}
    assert method(QKVParallelLinear, f"{ATTENTION}.qkv_proj") == "W8A8StaticLinearMethod"
    assert method(RowParallelLinear, f"{ATTENTION}.o_proj") == "UnquantizedLinearMethod"
    assert method(RowParallelLinear, f"{MLP}.down_proj") == "W8A8DynamicLinearMethod"
    assert (
        method(RoutedExperts, EXPERTS, moe_config=SimpleNamespace(num_logical_experts=2), **names)
        == "W8A8DynamicExpertsMethod"
    )
    config._description = Description(described({f"{ATTENTION}.kv_b_proj": "W8A8"}))
    with pytest.raises(ValueError, match=r"kv_b_proj' is of type 'W8A8'; latent attention reads this weight back"):
        method(RowParallelLinear, f"{ATTENTION}.kv_b_proj")
    with pytest.raises(ValueError, match=r"no type for 'model\.layers\.7\.mlp\.down_proj\.weight'"):
        method(RowParallelLinear, "model.layers.7.mlp.down_proj")


def test_tensors_that_were_not_loaded_are_named():
    check_loaded("layer", weight_scale=torch.ones(3))
    check_symmetric("layer", torch.zeros(3))
    with pytest.raises(ValueError, match=r"layer 'a\.b': weight_scale is not in the checkpoint's files, or not finite"):
        check_loaded("a.b", weight_scale=torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match=r"layer 'a\.b': weight_offset has values other than 0"):
        check_symmetric("a.b", torch.tensor([0.0, 3.0]))


@pytest.mark.parametrize(
    ("activation", "intermediate", "message"),
    [
        ("silu", 96, r"experts 'a\.experts': 96 intermediate features on each rank, which must be a multiple of 64"),
        ("swigluoai", 128, "MoE layer with activation 'swigluoai'"),
    ],
)
def test_experts_that_kernels_cannot_take_are_named_before_weights_load(activation, intermediate, message):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm_ascend.quantization.moe import W8A8DynamicExpertsMethod

    layer = SimpleNamespace(layer_name="a.experts", activation=MoEActivation(activation), swiglu_limit=None)
    method = W8A8DynamicExpertsMethod(SimpleNamespace(has_bias=False))
    with pytest.raises(ValueError, match=message):
        method.create_weights(layer, 2, 256, intermediate, torch.bfloat16)


def static_layer(scales=(0.5, 0.5), deq_scale=0.5):
    layer = torch.nn.Module()
    layer.prefix, layer.params_dtype = "a.qkv_proj", torch.bfloat16
    layer.bias = Parameter(torch.ones(4))
    tensors = {
        "input_scale": torch.tensor(scales),
        "input_offset": torch.zeros(2),
        "deq_scale": torch.full((4,), deq_scale),
        "quant_bias": torch.arange(4, dtype=torch.int32),
    }
    for name, tensor in tensors.items():
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))
    return layer


def processed(layer):
    from vllm_ascend.quantization.linear import W8A8StaticLinearMethod

    W8A8StaticLinearMethod().process_weights_after_loading(layer)
    return layer.quant


def test_a_float16_checkpoint_has_the_scales_bits_in_an_int64():
    from vllm_ascend.quantization.linear import float_scale

    scale = torch.tensor([0.5, 1e-30, 2.0, 0.1])
    assert torch.equal(float_scale(scale.view(torch.int32).to(torch.int64)), scale)
    assert torch.equal(float_scale(scale), scale)


def test_the_bias_of_a_static_layer_is_in_quant_bias_alone():
    layer = static_layer()
    assert torch.equal(processed(layer).quant_bias, torch.arange(4, dtype=torch.int32))
    assert layer.bias is None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (static_layer(scales=(0.5, 0.25)), r"its fused parts have input_scale \[0.5, 0.25\], but one input"),
        (static_layer(scales=(0.5, torch.nan)), "input_scale is not in the checkpoint's files"),
        (static_layer(deq_scale=torch.nan), "deq_scale is not in the checkpoint's files"),
    ],
)
def test_a_static_layer_that_does_not_fit_is_named(layer, message):
    with pytest.raises(ValueError, match=message):
        processed(layer)


# Which method a model gets, before anything starts. In a process of its own: vLLM's configuration wants to be the first to touch the device.
CASES = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

answers = {}
for name, options in json.loads(sys.argv[1]).items():
    try:
        config = EngineArgs(skip_tokenizer_init=True, **options).create_engine_config()
        answers[name] = [config.model_config.quantization, type(config.quant_config).__name__]
    except ValueError as error:
        answers[name] = str(error)
parsed = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", "m", "--quantization", "ascend"])
answers["command line"] = parsed.quantization
print("ANSWERS" + json.dumps(answers))
"""


def test_which_method_a_model_gets(tmp_path):
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 64, "vocab_size": 100, "dtype": "bfloat16", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    good = json.dumps(CONTENT)
    descriptions = {
        "quantised": good,
        "float": None,
        "w4a8": json.dumps(CONTENT | {f"{MLP}.up_proj.weight": "W4A8_DYNAMIC"}),
        "norm bias": json.dumps(CONTENT | {"model.norm.bias": "FLOAT"}),
        "torn": good[:50],
        "list": "[]",
    }
    for name, description in descriptions.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        if description is not None:
            (tmp_path / name / "quant_model_description.json").write_text(description)
    mindie = tmp_path / "mindie"
    mindie.mkdir()
    (mindie / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"group_size": 0, "kv_quant_type": None}})
    )
    (mindie / "quant_model_description.json").write_text(good)
    asked = {name: {"model": str(tmp_path / name)} for name in [*descriptions, "mindie"]}
    asked["said"] = asked["quantised"] | {"quantization": "ascend"}
    asked["mindie said"] = asked["mindie"] | {"quantization": "ascend"}
    asked["missing"] = asked["float"] | {"quantization": "ascend"}
    asked["float32"] = asked["quantised"] | {"dtype": "float32"}
    done = subprocess.run(
        [sys.executable, "-c", CASES, json.dumps(asked)], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.rpartition("ANSWERS")[2])
    ours = ["ascend", "AscendQuantizationConfig"]
    for name in ("quantised", "said", "mindie", "mindie said"):
        assert answers[name] == ours, name
    assert answers["float"] == [None, "NoneType"]
    assert answers["command line"] == "ascend"
    expected = {
        "w4a8": f"'{MLP}.up_proj.weight' is of type 'W4A8_DYNAMIC'. {SUPPORTED}",
        "norm bias": "'model.norm.bias' is the bias of an RMSNorm",
        "torn": "is not JSON",
        "list": "must be one JSON object, got list",
        "missing": "has no quant_model_description.json, as checkpoints quantised by ModelSlim have",
        "float32": "torch.float32 is not supported for quantization method ascend",
    }
    for name, message in expected.items():
        assert message in answers[name], name
