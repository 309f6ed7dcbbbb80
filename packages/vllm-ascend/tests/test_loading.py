# SPDX-License-Identifier: Apache-2.0
"""Weights of an engine: all of them are loaded or the missing ones are named, the first time and anew; and engines without weights (`--load-format dummy`).

Each checkpoint is tried once whole and once without one tensor of each kind. An engine whose weights were loaded anew must answer as one that was
started with them.
"""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from engine_jobs import ONE_PROCESS
from int8_models import PROMPTS as MANY
from int8_models import quantise_statically
from torch import nn
from vllm_ascend.quantization.linear import float_scale

GREEDY = {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "detokenize": False, "prompt_logprobs": 0}
SMALL = {
    "dtype": "bfloat16",
    "max_model_len": 160,
    "max_num_seqs": 1,  # one request after the other, so that the same weights give the same bits
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}
PROMPTS = MANY[1:4]
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


# Loading anew, layer by layer


class TwoLayers(nn.Module):
    """A model of vLLM's kind, as far as loading goes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def load_weights(self, weights):
        for name, tensor in weights:
            parameter = self.get_parameter(name)
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


def default_weight_loader(param, loaded_weight):
    param.data.copy_(loaded_weight)


def given(*names):
    shapes = {"weight": (2, 2), "bias": (2,)}
    return [(name, torch.full(shapes[name.partition(".")[2]], 7.0)) for name in names]


FIRST, SECOND = ("first.weight", "first.bias"), ("second.weight", "second.bias")


@pytest.mark.parametrize(
    ("names", "partial", "missing"),
    [
        (FIRST + SECOND, False, None),
        (SECOND, True, None),
        (SECOND, False, "lacks 2 of the tensors that rank 0 needs, or parts of them: 'first.bias', 'first.weight' "),
        (("first.weight", *SECOND), True, "lacks 1 of the tensors that rank 0 needs, or parts of them: 'first.bias' "),
    ],
)
def test_a_layer_is_replaced_as_a_whole_or_not_at_all(names, partial, missing):
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )
    from vllm_ascend.loader import reloading

    model = TwoLayers().requires_grad_(False)
    record_metadata_for_reloading(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    load_weights = reloading(model, None, partial=partial)
    initialize_layerwise_reload(model)
    if missing is None:
        load_weights(given(*names))
        finalize_layerwise_reload(model, None)
    else:
        with pytest.raises(ValueError, match=re.escape(missing)):
            load_weights(given(*names))
    parameters = dict(model.named_parameters())
    assert not any(parameter.is_meta for parameter in parameters.values())
    for layer in (FIRST, SECOND):
        for name in layer:
            kept = not set(layer) <= set(names)
            if name != "first.bias":  # vLLM writes a bias in its place at once
                assert torch.equal(parameters[name], before[name] if kept else torch.full_like(before[name], 7.0)), name


def test_weights_that_are_streamed_are_not_replaced(monkeypatch):
    from vllm_ascend import parallel
    from vllm_ascend.layers import linear

    linear.refuse_to_reload()
    sharded = SimpleNamespace(env=SimpleNamespace(o_shard=object()))
    monkeypatch.setattr(parallel, "current", lambda: sharded)
    with pytest.raises(ValueError, match="weights cannot be loaded anew with layer_sharding"):
        linear.refuse_to_reload()


# Checkpoints of every kind, each with other weights under A and B

COMMON = {
    "vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 256,
    "initializer_range": 0.1,
}  # fmt: skip


def models():
    """Name -> a random model: fused q, k and v with biases, its LM head tied; latent attention, a dense MLP, shared and routed experts."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

    deepseek = DeepseekV2Config(
        **COMMON, num_key_value_heads=4, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None,
        n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, first_k_dense_replace=1, topk_method="greedy",
        n_group=1, topk_group=1, tie_word_embeddings=False,
    )  # fmt: skip
    yield "static", Qwen2ForCausalLM(Qwen2Config(**COMMON, num_key_value_heads=2, tie_word_embeddings=True))
    yield "float", DeepseekV2ForCausalLM(deepseek)


def merged(static, dynamic, folder):
    """A checkpoint whose o_proj and q_proj are those of `static`, everything else of `dynamic`; with what ModelSlim keeps beside a rotated model."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(dynamic, folder)
    kinds, tensors = {"is_rot_used": True}, {"rot.weight": torch.eye(256)}
    for source, wanted in ((dynamic, False), (static, True)):
        described = json.loads((source / "quant_model_description.json").read_text())
        for name, tensor in load_file(source / "quant_model_weights.safetensors").items():
            if (".o_proj." in name or ".q_proj." in name) == wanted:
                kinds[name], tensors[name] = described[name], tensor
    save_file(tensors, folder / "quant_model_weights.safetensors", metadata={"format": "pt"})
    (folder / "quant_model_description.json").write_text(json.dumps(kinds))
    return folder


def as_older(folder):
    """The checkpoint as older ModelSlim has it: the weights' own scales and offsets beside the others, and another name of the description."""
    from safetensors.torch import load_file, save_file

    description = folder / "quant_model_description.json"
    kinds = json.loads(description.read_text())
    file = folder / "quant_model_weights.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".deq_scale")]:
        layer = name.removesuffix(".deq_scale")
        scale = float_scale(tensors[name]) / tensors[f"{layer}.input_scale"]
        tensors |= {f"{layer}.weight_scale": scale[:, None], f"{layer}.weight_offset": torch.zeros(len(scale), 1)}
        kinds |= {f"{layer}.weight_scale": "W8A8", f"{layer}.weight_offset": "W8A8"}
    save_file(tensors, file, metadata={"format": "pt"})
    description.unlink()
    (folder / "quant_model_description_w8a8.json").write_text(json.dumps(kinds))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(kind, "A" or "B") -> folder. Kinds: "static" scales in a dense model; a MoE model in "float", and with layers of each "mixed" type."""
    from ascend_sim.checkpoints import quantise

    root, made = tmp_path_factory.mktemp("checkpoints"), {}
    for seed, letter in enumerate("AB"):
        torch.manual_seed(seed)
        for name, model in models():
            model.float().eval()
            with torch.no_grad():
                for path, parameter in model.named_parameters():
                    if path.endswith("bias"):
                        parameter.normal_()
            source = root / f"{name}-source-{letter}"
            model.save_pretrained(source)
            static = quantise_statically(model, source, root / f"{name}-static-{letter}", PROMPTS[:1])
            if name == "static":
                made["static", letter] = as_older(static)
            else:
                made["float", letter] = source
                dynamic = quantise(source, root / f"dynamic-{letter}", keep_float=())
                made["mixed", letter] = merged(static, dynamic, root / f"mixed-{letter}")
    return made


def without(folder, name, target):
    """A copy of a checkpoint whose files lack one tensor."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return str(target)


ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
ABSENT = {
    "static": [
        *(f"{ATTENTION}.{name}" for name in ("q_proj.weight", "k_proj.quant_bias", "v_proj.input_scale", "k_proj.input_offset", "q_proj.deq_scale", "v_proj.weight_scale")),
        f"{MLP}.down_proj.weight", f"{MLP}.down_proj.quant_bias", f"{MLP}.gate_proj.weight", "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
    "float": [f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.kv_b_proj.weight", "model.layers.0.mlp.up_proj.weight", f"{MLP}.experts.6.down_proj.weight"],
    "mixed": [
        *(f"{MLP}.experts.{name}" for name in (
            "3.gate_proj.weight", "7.up_proj.weight", "0.down_proj.weight", "3.up_proj.weight_scale", "5.down_proj.weight_scale", "5.gate_proj.weight_offset",
        )),
        f"{MLP}.gate.weight", f"{MLP}.shared_experts.up_proj.weight", f"{MLP}.shared_experts.gate_proj.weight_scale", f"{ATTENTION}.kv_b_proj.weight",
        f"{ATTENTION}.kv_a_layernorm.weight", f"{ATTENTION}.o_proj.weight", "model.norm.weight", "lm_head.weight",
    ],
}  # fmt: skip


ASLEEP = {"before": [["sleep", 2], ["wake_up", ["weights"]], ["reload"], ["wake_up", ["kv_cache"]]]}
ANEW = 3  # each checkpoint of so many is also tried in an engine that runs
LACKS = "lacks 1 of the tensors that rank 0 needs, or parts of them: '{}' (as vLLM's model names them)."


def job(folder, *runs, options=None, **more):
    engine = {"model": str(folder), **SMALL, **(options or {})}
    return {"engine": engine, "runs": [run | {"prompts": PROMPTS, "sampling": GREEDY} for run in runs], **more}


def said(run):
    return [(output["tokens"], output["prompt_tokens"]) for output in run]


def finite(run):
    return all(logprob > -torch.inf for output in run for logprob, _ in output["prompt_tokens"])


@pytest.mark.slow
def test_what_a_checkpoint_lacks_is_named_and_weights_are_replaced(checkpoints, tmp_path, run_engines):
    jobs, incomplete = [], {}
    for kind, names in ABSENT.items():
        b = checkpoints[kind, "B"]
        incomplete[kind] = [without(b, name, tmp_path / f"{kind}-{at}") for at, name in enumerate(names)]
        anew = [{"weights_path": folder} for folder in [*incomplete[kind][::ANEW], str(b)]]
        runs = [{}, {"reload": [{"is_checkpoint_format": False}, *anew]}, ASLEEP]
        options = {"enable_sleep_mode": True}
        jobs += [job(checkpoints[kind, "A"], *runs, load=[*incomplete[kind], str(b)], options=options), job(b, {})]
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("config.json", "quant_model_description.json"):
        shutil.copy(checkpoints["mixed", "A"] / name, empty)
    jobs.append(job(empty, {}, options={"load_format": "dummy"}))
    *results, dummy = run_engines(jobs, **ENVIRONMENT, **ONE_PROCESS)
    for kind, anew, started in zip(ABSENT, results[::2], results[1::2], strict=True):
        of_kernels, *refused, taken = anew["refusals"][1]
        *not_loaded, (loaded,) = anew["loads"]
        for name, (message,) in zip(ABSENT[kind], not_loaded, strict=True):
            assert LACKS.format(name) in str(message), (kind, name)
        for name, message in zip(ABSENT[kind][::ANEW], refused, strict=True):
            assert "what was given to reload_weights " + LACKS.format(name) in str(message), (kind, name)
        assert "give the weights as a checkpoint has them" in of_kernels, kind
        assert loaded is None, kind
        assert taken is None, kind
        assert said(anew["runs"][1]) == said(started["runs"][0]), kind
        assert said(anew["runs"][0]) != said(anew["runs"][1]), kind
        assert [one["said"] for one in anew["actions"][2]] == [None] * 4, kind
        assert said(anew["runs"][2]) == said(anew["runs"][1]), kind
    assert finite(dummy["runs"][0])


@pytest.mark.slow
def test_weights_are_replaced_on_ranks_with_shards_and_replicas(checkpoints, run_engines):
    """Each rank loads its own shards anew, and the experts of its slots, replicas among them; also after it has slept without its weights."""
    options = {
        "enable_sleep_mode": True, "tensor_parallel_size": 2, "enable_expert_parallel": True, "additional_config": {"eplb_config": {"num_redundant_experts": 4}},
    }  # fmt: skip
    a, b = (checkpoints["mixed", letter] for letter in "AB")
    jobs = [job(a, {}, {"reload": [{"weights_path": str(b)}]}, ASLEEP, options=options), job(b, {}, options=options)]
    anew, started = run_engines(jobs, **ENVIRONMENT)
    assert anew["refusals"][1] == [None]
    assert said(anew["runs"][1]) == said(started["runs"][0])
    assert said(anew["runs"][0]) != said(anew["runs"][1])
    assert [one["said"] for one in anew["actions"][2]] == [None] * 4
    assert said(anew["runs"][2]) == said(anew["runs"][1])
