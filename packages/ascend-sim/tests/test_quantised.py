# SPDX-License-Identifier: Apache-2.0
"""W8A8 checkpoints: what is in them against plain arithmetic, and smoothing, which must change nothing but what quantisation loses."""

import json

import pytest
import torch
from ascend_sim import checkpoints
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.3,
}  # fmt: skip
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama with biases in attention, one input channel much larger than the others, and an output channel of zeros."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
        model.model.layers[1].mlp.up_proj.weight[5] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spiky(tmp_path_factory):
    """A Llama whose activations have channels that are 60 times as large as others."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("spiky")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[3] *= 60
            for linear in (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.mlp.gate_proj,
                layer.mlp.up_proj,
            ):
                linear.weight[:, 3] /= 60
            layer.mlp.up_proj.weight[7] *= 60
            layer.mlp.down_proj.weight[:, 7] /= 60
    model.save_pretrained(folder)
    return folder


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            assert not found.keys() & weights.keys()
            found.update({name: weights.get_tensor(name) for name in weights.keys()})  # noqa: SIM118
    return found


def description_of(folder):
    return json.loads((folder / "quant_model_description.json").read_text())


def test_weights_are_the_nearest_multiples_of_their_channels_scale(tmp_path, llama):
    folder = checkpoints.quantise(llama, tmp_path / "w8a8")
    before, after = tensors_of(llama), tensors_of(folder)
    quantised = [name for name in before if name.split(".")[-2] in PROJECTIONS and name.endswith(".weight")]
    assert len(quantised) == 14
    assert set(after) == set(before) | {f"{name}_{end}" for name in quantised for end in ("scale", "offset")}
    for name, tensor in before.items():
        if name not in quantised:
            assert torch.equal(after[name], tensor)
            continue
        weight, scale, offset = after[name], after[f"{name}_scale"], after[f"{name}_offset"]
        assert (weight.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert scale.shape == offset.shape == (len(tensor), 1)
        assert not offset.any()
        error = (weight.double() * scale.double() - tensor.double()).abs()
        assert (error <= scale.double() * 0.5001).all()
        zeros = tensor.abs().amax(1) == 0
        assert (weight.abs().amax(1) == torch.where(zeros, 0, 127)).all()
        assert (scale[zeros] == 1).all()


def test_the_description_has_the_type_of_every_tensor(tmp_path, llama):
    folder = checkpoints.quantise(llama, tmp_path / "w8a8", keep_float=("down_proj",))
    description = description_of(folder)
    assert description["model_quant_type"] == "W8A8_DYNAMIC"
    types = {name: kind for name, kind in description.items() if "." in name}
    assert set(types) == set(tensors_of(folder))
    for name, kind in types.items():
        layer, tensor = name.split(".")[-2:]
        is_quantised = layer in PROJECTIONS - {"down_proj"} and tensor != "bias"
        assert kind == ("W8A8_DYNAMIC" if is_quantised else "FLOAT"), name
    assert json.loads((folder / "config.json").read_text()) == json.loads((llama / "config.json").read_text())


def test_experts_are_quantised_and_their_router_is_not(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE, head_dim=8, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    description = description_of(checkpoints.quantise(tmp_path / "moe", tmp_path / "w8a8"))
    for expert in range(3):
        for name in ("gate_proj", "up_proj", "down_proj"):
            for end in ("weight", "weight_scale", "weight_offset"):
                assert description[f"model.layers.1.mlp.experts.{expert}.{name}.{end}"] == "W8A8_DYNAMIC"
    assert description["model.layers.1.mlp.gate.weight"] == "FLOAT"


def test_a_sharded_mixtral_gets_as_many_files_and_an_index(tmp_path, spiky):
    moe = checkpoints.upcycle(spiky, tmp_path / "moe", experts=2, top_k=1)
    stages = []
    folder = checkpoints.quantise(moe, tmp_path / "w8a8", progress=lambda *stage: stages.append(stage))
    assert stages == [("quantise", done, 3) for done in range(4)]
    names = [f"quant_model_weights-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(file.name for file in folder.glob("*.safetensors")) == names
    index = json.loads((folder / "quant_model_weights.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(folder))
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as weights:
            assert name in weights.keys()  # noqa: SIM118
    description = description_of(folder)
    assert description["model.layers.0.block_sparse_moe.experts.1.w3.weight"] == "W8A8_DYNAMIC"
    assert description["model.layers.0.block_sparse_moe.gate.weight"] == "FLOAT"


def test_a_second_call_changes_nothing_and_an_interrupted_one_leaves_nothing(tmp_path, llama):
    def interrupt(stage, done, total):
        raise KeyboardInterrupt

    for make in (checkpoints.quantise, lambda *args, **options: checkpoints.smooth(*args, texts=[[1]], **options)):
        if make is not checkpoints.quantise:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "plain")
        source = llama if make is checkpoints.quantise else tmp_path / "plain"
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "made", progress=interrupt)
        assert not (tmp_path / "made").exists()
        made = make(source, tmp_path / "made")
        before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
        assert make(source, made) == made
        assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before
        made.rename(tmp_path / f"made-{id(make)}")


def test_what_cannot_be_quantised_is_refused(tmp_path, llama):
    done = checkpoints.quantise(llama, tmp_path / "w8a8")
    with pytest.raises(ValueError, match="is quantised already"):
        checkpoints.quantise(done, tmp_path / "again")
    with pytest.raises(ValueError, match="has no linear layers to quantise"):
        checkpoints.quantise(llama, tmp_path / "nothing", keep_float=tuple(PROJECTIONS))
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        checkpoints.quantise(tmp_path, tmp_path / "nothing")
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_text("{}")
    index = {"weight_map": {"model.layers.0.mlp.experts.gate_up_proj": "model.safetensors"}}
    (fused / "model.safetensors.index.json").write_text(json.dumps(index))
    (fused / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"experts in one tensor, model.layers.0.mlp.experts.gate_up_proj"):
        checkpoints.quantise(fused, tmp_path / "nothing")


# smooth


def logits_of(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(tokens).logits


def loss_by_quantisation(folder, tokens, reference, tmp_path):
    """Mean squared error of logits when every projection has rounded weights, and inputs rounded by token."""
    quantised = tensors_of(checkpoints.quantise(folder, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    def rounded(x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale

    for name, layer in model.named_modules():
        if f"{name}.weight_scale" in quantised:
            with torch.no_grad():
                layer.weight.copy_(quantised[f"{name}.weight"] * quantised[f"{name}.weight_scale"])
            layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    with torch.inference_mode():
        return (model(tokens).logits - reference).square().mean().item()


def test_smoothing_leaves_every_bit_of_the_logits_and_lowers_what_quantisation_loses(tmp_path, spiky):
    torch.manual_seed(3)
    texts = [list(range(20)), [5, 3, 9]]
    tokens = torch.randint(0, 64, (2, 24))
    smoothed = checkpoints.smooth(spiky, tmp_path / "smooth", texts=texts)
    assert any(
        not torch.equal(a, b) for a, b in zip(tensors_of(spiky).values(), tensors_of(smoothed).values(), strict=True)
    )
    reference = logits_of(spiky, tokens)
    assert torch.equal(logits_of(smoothed, tokens), reference)
    plain = loss_by_quantisation(spiky, tokens, reference, tmp_path / "plain-w8a8")
    assert loss_by_quantisation(smoothed, tokens, reference, tmp_path / "smooth-w8a8") < plain / 4


@pytest.mark.parametrize("texts", [[], [[1], []]])
def test_smoothing_needs_texts(tmp_path, spiky, texts):
    with pytest.raises(ValueError, match="must be texts of at least one token each"):
        checkpoints.smooth(spiky, tmp_path / "made", texts=texts)


def test_smoothing_refuses_what_is_no_plain_llama(tmp_path, llama):
    with pytest.raises(ValueError, match="attention_bias = True: only False can be smoothed"):
        checkpoints.smooth(llama, tmp_path / "made", texts=[[1]])
