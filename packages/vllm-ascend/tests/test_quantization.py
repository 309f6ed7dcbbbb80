# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that ModelSlim has quantised: what their description may say. Engines on them are in test_quantization_engines.py."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn import Parameter
from vllm_ascend.config import AscendConfig
from vllm_ascend.quantization.checks import check_finite, check_product, check_symmetric
from vllm_ascend.quantization.description import Description
from vllm_ascend.quantization.files import lacking

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


FILE = "quant_model_description.json"


def read(content, rms_norms=True):
    return Description.read(content, FILE, rms_norms=rms_norms)


def test_types_of_layers():
    description = read(CONTENT)
    assert description.linear(f"{ATTENTION}.qkv_proj", PACKED) == "W8A8"
    assert description.linear(f"{ATTENTION}.o_proj", PACKED) == "FLOAT"
    assert description.linear(f"{MLP}.gate_up_proj", PACKED) == "W8A8_DYNAMIC"
    assert description.linear(f"{MLP}.down_proj", PACKED) == "W8A8_DYNAMIC"
    assert description.experts(EXPERTS, PROJECTIONS, 2) == "W8A8_DYNAMIC"
    assert description.linear("lm_head", {}) == "FLOAT"
    description.check_float("lm_head")
    description.check_float("model.embed_tokens")  # not named: no layer of this kind is quantised


def test_names_follow_the_model():
    renamed = read(CONTENT).renamed(lambda name: None if name == "lm_head.weight" else f"language_model.{name}")
    assert renamed.linear(f"language_model.{ATTENTION}.qkv_proj", PACKED) == "W8A8"
    with pytest.raises(ValueError, match="no type for"):
        renamed.linear("language_model.lm_head", {})


ROTATED = {
    "is_rot_used": True,
    "optional": {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}},
}
ONLINE = "rotations that are applied in every step (online QuaRot) are not supported"
STATIC_EXPERTS = described({f"{EXPERTS}.{e}.{name}": "W8A8" for e in range(2) for name in PROJECTIONS})
WRONG_CONTENTS = [
    ({f"{MLP}.up_proj.weight": "W4A8_DYNAMIC"}, f"'{MLP}.up_proj.weight' is of type 'W4A8_DYNAMIC'. {SUPPORTED}"),
    ({f"{MLP}.up_proj.weight": "W4A4_DYNAMIC", f"{MLP}.up_proj.weight_scale": "W4A4_DYNAMIC"}, "(and 1 more tensors) is of type 'W4A4_DYNAMIC'"),
    ({f"{ATTENTION}.k_proj.kv_cache_scale": "C8"}, f"'{ATTENTION}.k_proj.kv_cache_scale' is of type 'C8'"),
    ({"kv_quant_type": "C8"}, f"kv_quant_type='C8' is not supported. {SUPPORTED}"),
    ({"kv_cache_type": "C8"}, "kv_cache_type='C8' is not supported"),
    ({"fa_quant_type": "FAQuant"}, "fa_quant_type='FAQuant' is not supported"),
    ({"reduce_quant_type": "per_channel"}, "reduce_quant_type='per_channel' is not supported"),
    ({"indexer_quant_type": "INT8"}, "indexer_quant_type='INT8' is not supported"),
    ({"group_size": 256}, "group_size=256: weights quantised in groups are not supported"),
    ({"metadata": {"quarot": {"heads_rotation": {"layers": ["0"]}}}}, f"metadata.quarot.heads_rotation for layers ['0']: {ONLINE}"),
    ({f"{MLP}.down_proj.kronecker_rotation_m": "FLOAT"}, f"'{MLP}.down_proj.kronecker_rotation_m': {ONLINE}"),
    (STATIC_EXPERTS, f"'{EXPERTS}.0.gate_proj' (and 5 more experts) is of type 'W8A8'. {SUPPORTED}"),
    (described({f"{ATTENTION}.kv_b_proj": "W8A8"}), f"'{ATTENTION}.kv_b_proj' is of type 'W8A8'; latent attention reads this weight back"),
    ({"lm_head.weight": "W8A8_DYNAMIC"}, "'lm_head' is of type 'W8A8_DYNAMIC'; embeddings and LM heads must be FLOAT"),
    ({"model.layers.0.input_layernorm.bias": "FLOAT"}, "'model.layers.0.input_layernorm.bias' is the bias of an RMSNorm"),
    ({f"{MLP}.gate.weight": "W8A8"}, f"lacks '{MLP}.gate.input_scale' (and 3 more tensors), which type 'W8A8' of its layer needs"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), WRONG_CONTENTS)
def test_what_is_not_supported_is_named(more, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(CONTENT | more)
    assert FILE in str(caught.value)


def test_all_that_is_not_supported_is_one_error_of_bounded_length():
    many = {f"model.layers.{layer}.mlp.up_proj.weight": "W4A8_DYNAMIC" for layer in range(1000)}
    with pytest.raises(ValueError, match="things are wrong") as caught:
        read(CONTENT | many | STATIC_EXPERTS | {"group_size": 32, "fa_quant_type": "x" * 10_000})
    message = str(caught.value)
    for part in ("W4A8_DYNAMIC", "group_size=32", "fa_quant_type='xxx", "experts", "and 999 more tensors"):
        assert part in message
    assert len(message) < 3000


def test_a_model_whose_weights_are_rotated_is_served():
    assert (
        read(CONTENT | ROTATED | {"metadata": {"quarot": {"heads_rotation": {"layers": []}}}}).types
        == read(CONTENT).types
    )


def test_a_description_of_nothing_is_refused():
    with pytest.raises(ValueError, match="names no tensors"):
        read({"model_quant_type": "W8A8"})


def without(name):
    return {key: kind for key, kind in CONTENT.items() if key != name}


def qkv(content):
    return Description(content, FILE).linear(f"{ATTENTION}.qkv_proj", PACKED)


def experts(content):
    return Description(content, FILE).experts(EXPERTS, PROJECTIONS, 2)


def scales(content):
    return Description(content, FILE).has_weight_scale(f"{ATTENTION}.qkv_proj", PACKED)


SCALES = {f"{ATTENTION}.{part}_proj.weight_{end}": "W8A8" for part in "qkv" for end in ("scale", "offset")}
WRONG_LAYERS = [
    (qkv, without(f"{ATTENTION}.k_proj.weight"), f"no type for '{ATTENTION}.k_proj.weight', of the model's layer '{ATTENTION}.qkv_proj'. {SUPPORTED}"),
    (read, without(f"{ATTENTION}.v_proj.deq_scale"), f"lacks '{ATTENTION}.v_proj.deq_scale', which type 'W8A8' of its layer needs"),
    (qkv, CONTENT | {f"{ATTENTION}.v_proj.weight": "FLOAT"}, f"parts of layer '{ATTENTION}.qkv_proj' must have one type, but '{ATTENTION}.q_proj' W8A8, '{ATTENTION}.v_proj' FLOAT"),
    (experts, without(f"{EXPERTS}.1.up_proj.weight"), f"no type for '{EXPERTS}.1.up_proj.weight', of the model's layer '{EXPERTS}'"),
    (read, without(f"{EXPERTS}.0.down_proj.weight_scale"), f"lacks '{EXPERTS}.0.down_proj.weight_scale', which type 'W8A8_DYNAMIC'"),
    (experts, CONTENT | {f"{EXPERTS}.1.down_proj.weight": "FLOAT"}, f"'{EXPERTS}.0.gate_proj' W8A8_DYNAMIC, '{EXPERTS}.1.down_proj' FLOAT"),
    (experts, CONTENT | STATIC_EXPERTS, f"experts '{EXPERTS}' are of type 'W8A8'. {SUPPORTED}"),
    (scales, {name: kind for name, kind in (CONTENT | SCALES).items() if name != f"{ATTENTION}.v_proj.weight_offset"}, f"lacks '{ATTENTION}.v_proj.weight_offset', which other parts of layer"),
    (lambda content: Description(content, FILE).check_float("lm_head"), CONTENT | {"lm_head.weight": "W8A8_DYNAMIC"}, "'lm_head' is of type 'W8A8_DYNAMIC'; embeddings and LM heads must be FLOAT"),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "content", "message"), WRONG_LAYERS)
def test_a_layer_that_does_not_fit_is_named(ask, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ask(content)


def test_a_static_layer_may_have_the_scale_of_its_weight():
    assert scales(CONTENT | SCALES)
    assert not scales(CONTENT)


def test_the_rms_norms_of_a_usual_checkpoint_are_fine():
    read(CONTENT | {"model.norm.weight": "FLOAT", f"{ATTENTION}.q_proj.bias": "FLOAT"})
    read(CONTENT | {"model.norm.bias": "FLOAT"}, rms_norms=False)


def test_tensors_that_the_files_lack_are_named(tmp_path):
    from safetensors.torch import save_file

    description = read(CONTENT)
    tensors = {name: torch.zeros(2, 1) for name in description.types if name != f"{MLP}.up_proj.weight_scale"}
    assert list(lacking(description, str(tmp_path), 2)) == []  # without safetensors nothing is known
    save_file({name: tensor for name, tensor in tensors.items() if "experts" in name}, tmp_path / "one.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "experts" not in name}, tmp_path / "two.safetensors")
    (finding,) = lacking(description, str(tmp_path), 2)
    assert (
        finding
        == f"the weight files of {str(tmp_path)!r} lack 1 tensors that {FILE} names: '{MLP}.up_proj.weight_scale'"
    )
    assert list(lacking(description, str(tmp_path), 0)) == []  # a draft's layer
    grouped = {f"{MLP}.up_proj.weight_scale": torch.zeros(2, 4)}
    save_file(grouped, tmp_path / "three.safetensors")
    (finding,) = lacking(description, str(tmp_path), 2)
    assert (
        f"1 weights quantised in groups, which is not supported; the first is '{MLP}.up_proj.weight_scale' [2, 4]"
        in finding
    )
    (tmp_path / "three.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"three\.safetensors cannot be read"):
        list(lacking(description, str(tmp_path), 2))


def test_each_layer_gets_its_method():
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
    from vllm_ascend.quantization.config import AscendQuantizationConfig

    config = AscendQuantizationConfig()
    config._description = read(CONTENT | SCALES)
    config.packed_modules_mapping = PACKED

    def method(kind, prefix, load_format="auto", **attributes):
        layer = object.__new__(kind)
        torch.nn.Module.__init__(layer)
        for name, value in attributes.items():
            setattr(layer, name, value)
        run = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
        with mock.patch("vllm.config.get_current_vllm_config", return_value=run):
            return config.get_quant_method(layer, prefix)

    names = {f"ckpt_{name}_name": name for name in PROJECTIONS}
    static = method(QKVParallelLinear, f"{ATTENTION}.qkv_proj")
    assert (type(static).__name__, static._random, static._has_weight_scale) == ("W8A8StaticLinearMethod", False, True)
    assert type(method(RowParallelLinear, f"{ATTENTION}.o_proj")).__name__ == "UnquantizedLinearMethod"
    dynamic = method(RowParallelLinear, f"{MLP}.down_proj", "dummy")
    assert (type(dynamic).__name__, dynamic._random) == ("W8A8DynamicLinearMethod", True)
    assert (
        type(method(RoutedExperts, EXPERTS, moe_config=SimpleNamespace(num_logical_experts=2), **names)).__name__
        == "W8A8DynamicExpertsMethod"
    )
    with pytest.raises(ValueError, match=r"no type for 'model\.layers\.7\.mlp\.down_proj\.weight'"):
        method(RowParallelLinear, "model.layers.7.mlp.down_proj")


def test_scales_that_cannot_be_used_are_named():
    check_finite("layer", weight_scale=torch.ones(3))
    check_symmetric("layer", torch.zeros(3))
    with pytest.raises(ValueError, match=r"layer 'a\.b': weight_scale has values that are not finite"):
        check_finite("a.b", weight_scale=torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match=r"layer 'a\.b': weight_offset has values other than 0"):
        check_symmetric("a.b", torch.tensor([0.0, 3.0]))


def test_deq_scale_is_the_product_of_the_two_others_but_for_rounding():
    generator = torch.Generator().manual_seed(0)
    weight_scale = torch.rand(100_000, 1, generator=generator) * 1e-3
    weight_scale[7] = 1e-3
    for input_scale in torch.rand(10, 1, generator=generator) + 0.01:
        product = (input_scale * weight_scale).reshape(-1)
        rounded = [tensor.bfloat16().float() for tensor in (product, input_scale, weight_scale)]
        check_product("a.b", product, *rounded[1:])
        check_product("a.b", *rounded)
        check_product("a.b", product, input_scale.half(), weight_scale.half())
        product[7] *= 1.02
        with pytest.raises(ValueError, match=r"layer 'a\.b': deq_scale\[7\] is .*, but input_scale \* weight_scale is"):
            check_product("a.b", product, input_scale, weight_scale)


@pytest.mark.parametrize(
    ("activation", "intermediate", "message"),
    [
        ("silu", 96, r"experts 'a\.experts': 96 intermediate features on each rank, which must be a multiple of 64"),
        ("relu2", 128, "MoE layer with activation 'relu2'"),
    ],
)
def test_experts_that_kernels_cannot_take_are_named_before_weights_load(activation, intermediate, message):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm_ascend.quantization.moe import W8A8DynamicExpertsMethod

    layer = SimpleNamespace(layer_name="a.experts", activation=MoEActivation(activation), swiglu_limit=None)
    method = W8A8DynamicExpertsMethod(SimpleNamespace(has_bias=False))
    with pytest.raises(ValueError, match=message):
        method.create_weights(layer, 2, 256, intermediate, torch.bfloat16)


def static_layer(scales=(0.5, 0.5), deq_scale=0.5, **more):
    layer = torch.nn.Module()
    layer.prefix, layer.params_dtype = "a.qkv_proj", torch.bfloat16
    layer.bias = Parameter(torch.ones(4))
    tensors = {
        "input_scale": torch.tensor(scales),
        "input_offset": torch.zeros(2),
        "deq_scale": torch.full((4,), deq_scale),
        "quant_bias": torch.arange(4, dtype=torch.int32),
    }
    for name, tensor in (tensors | more).items():
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))
    return layer


def processed(layer):
    from vllm_ascend.quantization.linear import W8A8StaticLinearMethod

    method = W8A8StaticLinearMethod(has_weight_scale=hasattr(layer, "weight_scale"))
    method.process_weights_after_loading(layer)
    return layer.quant


def test_a_static_layer_may_have_the_scale_of_its_weight_in_it():
    layer = static_layer(weight_scale=torch.ones(4, 1), weight_offset=torch.zeros(4, 1))
    assert torch.equal(processed(layer).deq_scale, torch.full((4,), 0.5))
    assert not hasattr(layer, "weight_scale")
    assert not hasattr(layer, "weight_offset")


def test_what_holds_a_layers_product_computes_with_weights_that_are_loaded_anew():
    """As vLLM does it: parameters of the checkpoint's form in the layer, processed once more."""
    layer, other = static_layer(), static_layer(scales=(0.25, 0.25), deq_scale=0.125)
    held, wanted = processed(layer), processed(static_layer(scales=(0.25, 0.25), deq_scale=0.125))
    for name, parameter in other.named_parameters():
        layer.register_parameter(name, parameter)
    assert processed(layer) is held
    for name in (
        "input_scale",
        "input_offset",
        "deq_scale",
        "quant_bias",
        "_reciprocal",
        "_offset",
        "_dequantised_bias",
    ):
        assert torch.equal(getattr(held, name), getattr(wanted, name)), name


@pytest.mark.parametrize(("mode", "streams", "wanted"), [(1, False, "NZ"), (0, False, "ND"), (1, True, "ND")])
def test_the_format_of_weights(monkeypatch, mode, streams, wanted):
    """Weights that an op sends from rank to rank keep their numbers in order."""
    import torch_npu
    from vllm_ascend import parallel

    monkeypatch.setattr(parallel, "_current", SimpleNamespace(config=AscendConfig(weight_nz_mode=mode)))
    weight = torch.arange(64 * 32, dtype=torch.int32).remainder(251).sub(125).to(torch.int8).view(64, 32)
    layer = static_layer(weight=weight.npu())
    layer.op = SimpleNamespace(streams_weight=streams)
    processed(layer)
    assert str(torch_npu.get_npu_format(layer.weight.data)).endswith(wanted)
    assert torch.equal(layer.weight.data.cpu(), weight)


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
        (static_layer(scales=(0.5, torch.nan)), "input_scale has values that are not finite"),
        (static_layer(deq_scale=torch.nan), "deq_scale has values that are not finite"),
        (
            static_layer(weight_scale=torch.full((4, 1), 2.0), weight_offset=torch.zeros(4, 1)),
            r"deq_scale\[0\] is 0.5, but input_scale \* weight_scale is 1; the checkpoint's scales do not belong together",
        ),
        (
            static_layer(weight_scale=torch.ones(4, 1), weight_offset=torch.ones(4, 1)),
            "asymmetric weights are not supported",
        ),
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


def test_the_files_of_a_multimodal_model_are_looked_at_before_its_tensors_are_renamed(tmp_path):
    """vLLM makes a config for the language model within a multimodal one, after it has given the description its own names."""
    from safetensors.torch import save_file
    from vllm_ascend.quantization.config import AscendQuantizationConfig, choose_by_folder

    save_file({name: torch.zeros(1, 1) for name in CONTENT if "." in name}, tmp_path / "model.safetensors")
    method = AscendQuantizationConfig()
    method._description = Description.read(CONTENT, FILE, rms_norms=True)
    model = SimpleNamespace(
        model=str(tmp_path), quantization="ascend", is_submodel_config=False, hf_config=None, hf_text_config=SimpleNamespace(num_hidden_layers=1)
    )  # fmt: skip
    whole = SimpleNamespace(model_config=model, quant_config=method, load_config=SimpleNamespace(load_format="auto"))
    choose_by_folder(whole)
    method._description = method.description.renamed(lambda name: f"language_model.{name}")
    with pytest.raises(ValueError, match="tensors that"):  # the check sees the difference
        choose_by_folder(whole)
    model.is_submodel_config = True
    choose_by_folder(whole)


def test_which_method_a_model_gets(tmp_path):
    from safetensors.torch import save_file

    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 64, "vocab_size": 100, "dtype": "bfloat16", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    good = json.dumps(CONTENT)
    older = "quant_model_description_w8a8.json"
    descriptions = {
        "quantised": {FILE: good},
        "float": {},
        "older": {older: good},
        "two older": {older: good, "quant_model_description_w8a8_dynamic.json": good},
        "w4a8": {FILE: json.dumps(CONTENT | {f"{MLP}.up_proj.weight": "W4A8_DYNAMIC", "group_size": 256})},
        "norm bias": {FILE: json.dumps(CONTENT | {"model.norm.bias": "FLOAT"})},
        "torn": {FILE: good[:50]},
        "list": {FILE: "[]"},
        "deep": {FILE: '{"a.b":' * 100_000},
        "long number": {FILE: good[:-1] + ', "version": ' + "9" * 5000 + "}"},
        "twice": {FILE: good[:-1] + f', "{MLP}.up_proj.weight": "FLOAT"}}'},
        "latin": {FILE: good.encode() + b"\xe9"},
    }
    for name, files in descriptions.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, inside in (
        ("inside", CONTENT),
        ("inside w4a8", {"model_quant_type": "W4A8", f"{MLP}.up_proj.weight": "W4A8_DYNAMIC"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"quantization_config": inside}))
    lacks = tmp_path / "lacks"
    lacks.mkdir()
    (lacks / "config.json").write_text(json.dumps(config))
    (lacks / FILE).write_text(good)
    kept = {name: torch.zeros(1, 1) for name in CONTENT if "." in name and name != f"{MLP}.up_proj.weight"}
    save_file(kept, lacks / "model.safetensors")
    mindie = tmp_path / "mindie"
    mindie.mkdir()
    (mindie / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"group_size": 0, "kv_quant_type": None}})
    )
    (mindie / "quant_model_description.json").write_text(good)
    names = [*descriptions, "mindie", "inside", "inside w4a8", "lacks"]
    asked = {name: {"model": str(tmp_path / name)} for name in names}
    asked["inside said"] = asked["inside"] | {"quantization": "ascend"}
    asked["older said"] = asked["older"] | {"quantization": "ascend"}
    asked["lacks said"] = asked["lacks"] | {"quantization": "ascend"}
    asked["lacks dummy"] = asked["lacks"] | {"load_format": "dummy"}
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
    for name in (
        "quantised", "said", "mindie", "mindie said", "older", "older said", "inside", "inside said", "lacks dummy",
    ):  # fmt: skip
        assert answers[name] == ours, name
    assert answers["float"] == [None, "NoneType"]
    assert answers["command line"] == "ascend"
    expected = {
        "w4a8": f"'{MLP}.up_proj.weight' is of type 'W4A8_DYNAMIC'. {SUPPORTED}",
        "norm bias": "'model.norm.bias' is the bias of an RMSNorm",
        "two older": "has several descriptions of its quantisation (quant_model_description_w8a8.json, quant_model_description_w8a8_dynamic.json)",
        "inside w4a8": f"quantization_config of config.json: '{MLP}.up_proj.weight' is of type 'W4A8_DYNAMIC'",
        "lacks": f"lack 1 tensors that {FILE} names: '{MLP}.up_proj.weight'",
        "lacks said": f"lack 1 tensors that {FILE} names: '{MLP}.up_proj.weight'",
        "torn": f"{FILE} of {str(tmp_path / 'torn')!r} is not JSON",
        "list": f"{FILE} of {str(tmp_path / 'list')!r} must be one JSON object, got list",
        "deep": f"{FILE} of {str(tmp_path / 'deep')!r} is nested too deeply",
        "long number": f"{FILE} of {str(tmp_path / 'long number')!r} is not JSON",
        "twice": f"{FILE} of {str(tmp_path / 'twice')!r} has the key '{MLP}.up_proj.weight' twice",
        "latin": f"{FILE} of {str(tmp_path / 'latin')!r} is not UTF-8",
        "missing": "has no quant_model_description.json, as checkpoints quantised by ModelSlim have",
        "float32": "torch.float32 is not supported for quantization method ascend",
    }
    for name, message in expected.items():
        assert message in answers[name], name
