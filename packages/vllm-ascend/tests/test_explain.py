# SPDX-License-Identifier: Apache-2.0
"""`vllm-ascend explain`: figures worked out by hand, every known architecture, and what it says of mistakes. Engines are held against it in
test_linear.py."""

import json
import os
import subprocess
import sys

import pytest
from ascend_comm import Topology
from typer.testing import CliRunner
from vllm_ascend import models
from vllm_ascend.cli import app
from vllm_ascend.config import AscendConfig
from vllm_ascend.explain import explain, merged
from vllm_ascend.models import ARCHITECTURES, layers_of, stage_layers
from vllm_ascend.moe_layers import moe_layers

DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "vocab_size": 500, "attention_bias": True,
}  # fmt: skip
MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "mlp_only_layers": [0, 1], "decoder_sparse_step": 1, "moe_intermediate_size": 32,
}  # fmt: skip
LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32,
    "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "vocab_size": 512,
}  # fmt: skip
E = 2  # bytes of bfloat16
VOCABULARY = 512  # padded


def rows(config, options=None, dp=1, pp=1, tp=1, **more):
    found = explain(config, AscendConfig.of(options or {}), Topology(dp * pp * tp, dp, pp, 1, tp), **more)
    return {row.path: row for row in found}


def of_layer(found, name, layer=0):
    return next(row for path, row in found.items() if path.endswith(f"layers.{layer}.{name}"))


def test_plain_tensor_parallel():
    found = rows(DENSE, tp=4)
    qkv, o_proj = of_layer(found, "self_attn.qkv_proj"), of_layer(found, "self_attn.o_proj")
    assert qkv.op == o_proj.op == ""
    assert qkv.ranks == (0, 1, 2, 3)
    assert (
        qkv.weight_bytes == (2 * 16 + 2 * 16) * (64 + 1) * E
    )  # 2 of 8 query heads, and one of the 2 key and value heads each twice there
    assert qkv.bytes_per_token == 0
    assert o_proj.weight_bytes == 64 * 128 // 4 * E
    assert o_proj.bytes_per_token == 2 * 64 * E * 3 / 4  # all-reduce
    assert found["lm_head"].bytes_per_token == VOCABULARY / 4 * E * 3
    assert found["model.embed_tokens"].weight_bytes == VOCABULARY // 4 * 64 * E


def test_flashcomm1_halves_what_a_row_layer_sends():
    split = rows(DENSE, {"enable_flashcomm1": True}, tp=4, tokens=1001)
    assert of_layer(split, "mlp.down_proj").bytes_per_token == 64 * E * 3 / 4  # reduce-scatter
    assert of_layer(split, "mlp.gate_up_proj").bytes_per_token == 64 * E * 3 / 4  # all-gather
    short = rows(DENSE, {"enable_flashcomm1": True}, tp=4, tokens=1000)
    assert of_layer(short, "mlp.down_proj").bytes_per_token == 2 * 64 * E * 3 / 4
    assert of_layer(short, "mlp.gate_up_proj").bytes_per_token == 0


def test_flashcomm2_with_streamed_weights():
    options = {"flashcomm2_parallel_size": 2, "layer_sharding": ["o_proj"]}
    found = rows(DENSE, options, tp=4, rank=3)
    o_proj = of_layer(found, "self_attn.o_proj")
    assert (o_proj.op, o_proj.ranks) == ("Flashcomm2OProjRowParallelOp", (1, 3))
    # all-to-all over 2 ranks, reduce-scatter over 2 of half the tokens, all-gather over 4
    assert o_proj.bytes_per_token == (128 / 4 / 2 + 64 / 2 / 2 + 64 * 3 / 4) * E
    shard = 64 * 128 // 2 * E
    assert (o_proj.weight_bytes, o_proj.bytes_per_step) == (shard // 2, shard / 2)


def test_layers_along_data_parallel():
    fine = {f"{name}_tensor_parallel_size": 2 for name in ("oproj", "mlp", "lmhead", "embedding")}
    found = rows(MOE, {"finegrained_tp_config": fine}, dp=4, rank=2)
    o_proj, gate_up = of_layer(found, "self_attn.o_proj"), of_layer(found, "mlp.gate_up_proj", 1)
    assert {row.ranks for row in (o_proj, gate_up, found["lm_head"], found["model.embed_tokens"])} == {(2, 3)}
    assert o_proj.bytes_per_token == (128 / 2 + 64) * E
    assert gate_up.bytes_per_token == 64 * E
    assert gate_up.weight_bytes == 2 * 96 // 2 * 64 * E
    assert found["lm_head"].bytes_per_token == (64 + VOCABULARY / 2) * E
    assert found["model.embed_tokens"].bytes_per_token == 4 + 64 * E
    assert of_layer(found, "mlp.gate", 2).op == "CustomReplicatedOp"
    assert not any("layers.2.mlp.gate_up" in path for path in found)


def test_latent_attention_and_shared_experts():
    found = rows(LATENT, tp=2)
    assert of_layer(found, "self_attn.fused_qkv_a_proj").weight_bytes == (48 + 32 + 8) * 64 * E
    assert of_layer(found, "self_attn.q_b_proj").weight_bytes == 4 * 24 // 2 * 48 * E
    assert of_layer(found, "mlp.down_proj").bytes_per_token == 2 * 64 * E / 2
    assert (
        of_layer(found, "mlp.shared_experts.down_proj", 1).bytes_per_token == 0
    )  # summed with the routed experts' output


def test_pipeline_stages_hold_their_layers():
    found = [rows(DENSE, pp=2, tp=2, rank=rank) for rank in (0, 3)]
    assert "model.embed_tokens" in found[0]
    assert "lm_head" not in found[0]
    assert "lm_head" in found[1]
    assert {row.ranks for row in found[1].values()} == {(2, 3)}
    assert all(any(f"layers.{n}." in path for path in found[n // 2]) for n in range(4))
    assert [len(stage_layers(30, 4, stage)) for stage in range(4)] == [7, 8, 8, 7]


def test_a_tied_lm_head_is_a_copy_on_a_stage_of_its_own():
    tied = DENSE | {"tie_word_embeddings": True}
    assert rows(tied)["lm_head"].weight_bytes == 0
    assert rows(tied, pp=2, rank=1)["lm_head"].weight_bytes == VOCABULARY * 64 * E


def test_a_dense_model_ignores_data_parallel():
    assert rows(DENSE, dp=2, tp=2) == rows(DENSE, tp=2)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_known_architecture(architecture):
    config = (
        LATENT | MOE | {"architectures": [architecture], "num_local_experts": 8, "shared_expert_intermediate_size": 32}
    )
    names = {layer.path.rpartition(".")[2] for layer in layers_of(config)}
    assert "o_proj" in names
    options = {"flashcomm2_parallel_size": 1}
    config = {
        name: value for name, value in config.items() if "lora" not in name or architecture.startswith("Deepseek")
    }
    found = rows(config, options, tp=2)
    assert of_layer(found, "self_attn.o_proj").op == "Flashcomm2OProjRowParallelOp"


def test_layers_that_differ_only_in_their_index_are_one_row():
    found = rows(DENSE, tp=2)
    counted = {row.path: count for row, count in merged(found.values())}
    assert counted["model.layers.*.mlp.down_proj"] == 4
    assert sum(counted.values()) == len(found)


def test_command_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    model, runner = str(tmp_path), CliRunner(env={"COLUMNS": "120"})

    def run(*arguments):
        return runner.invoke(app, ["explain", *arguments])

    done = run(model, "--tensor-parallel-size", "2", "--additional-config", '{"flashcomm2_parallel_size": 1}')
    assert done.exit_code == 0, done.output
    assert "Flashcomm2OProjRowParallelOp" in done.stdout
    assert "decoding steps of this model are captured in graphs" in done.stdout
    done = run(model, "--tensor-parallel-size", "4", "--json")
    paths = [row["path"] for row in json.loads(done.stdout)]
    assert paths[:2] == ["model.embed_tokens", "model.layers.0.self_attn.qkv_proj"]
    for arguments, message in (
        ((model, "--additional-config", '{"flashcomm2_parallel_size": 2}'), "flashcomm2_parallel_size"),
        ((model, "--additional-config", "{"), "error: "),
        ((model, "--rank", "1"), "rank"),
        ((f"{model}/config.json",), "there is no config.json"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1
        assert message in done.stderr


def test_nothing_of_vllm_is_loaded():
    code = "import sys, vllm_ascend.explain; print(sorted({'vllm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, check=True)
    assert done.stdout.strip() == "[]"


def test_a_path_that_the_system_refuses_is_no_fault_of_standard_output():
    done = subprocess.run(
        [sys.executable, "-m", "vllm_ascend.cli", "explain", "a" * 300], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: aaa")
    assert "config.json cannot be read: File name too long" in done.stderr


def test_what_it_cannot_explain():
    with pytest.raises(ValueError, match=r"architecture 'NewForCausalLM' is not known here; known are DeepseekV2"):
        rows(DENSE | {"architectures": ["NewForCausalLM"]})
    with pytest.raises(ValueError, match="dtype='int4': must be one of bfloat16"):
        rows(DENSE, dtype="int4")


@pytest.mark.parametrize(
    ("base", "key", "message"),
    [
        (DENSE, "intermediate_size", "lacks intermediate_size, which architecture 'Qwen3ForCausalLM' must have"),
        (LATENT, "kv_lora_rank", "lacks kv_lora_rank"),
        (LATENT, "v_head_dim", "lacks v_head_dim"),
        (LATENT, "moe_intermediate_size", "lacks moe_intermediate_size"),
    ],
)
def test_a_size_that_is_null_is_a_size_that_is_missing(base, key, message):
    with pytest.raises(ValueError, match=message):
        rows({**base, key: None})


def test_a_key_of_moe_layers_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match=r"has mlp_only_layers 5: vllm-ascend cannot read its MoE layers from that"):
        rows({**MOE, "mlp_only_layers": 5})


def test_moe_layers_are_found_once_for_a_model(monkeypatch):
    """Once for each layer is minutes for the most layers that are accepted."""
    asked = []
    monkeypatch.setattr(models, "moe_layers", lambda config: asked.append(config) or moe_layers(config))
    assert any("mlp.gate" in layer.path for layer in layers_of(MOE))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("told", "file", "by"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, False, "quantization_config"),
        ({"text_config": DENSE, "quantization_config": {"quant_method": "fp8"}}, False, "quantization_config"),
        ({}, True, "quant_model_description.json"),
        ({}, False, None),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_quantised_model_is_said_to_be_counted_without_quantisation(tmp_path, told, file, by, flags):
    (tmp_path / "config.json").write_text(json.dumps({**DENSE, **told}))
    if file:
        (tmp_path / "quant_model_description.json").write_text("{}")
    done = CliRunner().invoke(app, ["explain", str(tmp_path), *flags])
    assert done.exit_code == 0, done.output
    note = f"note: the model is quantised ({by}); all figures are those of bfloat16 weights and activations\n"
    assert done.stderr == ("" if by is None else note)
    if flags:
        json.loads(done.stdout)


NO_CONFIGS = {
    "null": (b"null", "must be one JSON object, got null"),
    "list": (b"[1, 2]", "must be one JSON object, got list"),
    "cut": (b'{"num_hidden', "is not JSON"),
    "deep": (b'{"a":' * 100_000, "is nested too deeply"),
    "long": (b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    "latin": (b'{"a": "\xe9"}', "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", [*NO_CONFIGS, "folder"])
def test_a_file_that_is_no_config_is_one_line(tmp_path, name):
    content, message = NO_CONFIGS.get(name, (b"", "cannot be read: Is a directory"))
    file = tmp_path / "config.json"
    file.mkdir() if name == "folder" else file.write_bytes(content)
    done = CliRunner().invoke(app, ["explain", str(tmp_path)])
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith(f"error: {file} ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"num_hidden_layers": None}, {}, "lacks num_hidden_layers, which architecture 'Qwen3ForCausalLM' must have"),
        ({"num_hidden_layers": "four"}, {}, "has num_hidden_layers 'four': it must be a whole number, 1 to 10000"),
        ({"num_hidden_layers": 10**12}, {}, "has num_hidden_layers 1000000000000: it must be a whole number"),
        ({"hidden_size": -64}, {}, "has hidden_size -64: it must be a whole number"),
        ({"num_attention_heads": 0}, {}, "has num_attention_heads 0: it must be"),
        ({"vocab_size": True}, {}, "has vocab_size True"),
        ({"intermediate_size": None}, {}, "lacks intermediate_size"),
        ({"architectures": None}, {}, "has architectures None: it must be a list"),
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, {"tp": 7}, r"tensor_parallel_size \(7\) must divide the model's 9 attention heads"),
        ({"num_key_value_heads": 3, "num_attention_heads": 12}, {"tp": 2}, r"tensor_parallel_size \(2\) must divide the model's 3 key and value heads"),
        ({}, {"pp": 99}, r"pipeline_parallel_size \(99\) must be at most the model's 4 layers"),
        ({}, {"tp": 3_000_000}, "world_size=3000000: must be at most 65536"),
    ],
)  # fmt: skip
def test_sizes_that_make_no_model(changes, sizes, message):
    config = {
        name: value for name, value in {**DENSE, **changes}.items() if value is not None or name == "architectures"
    }
    with pytest.raises(ValueError, match=message):
        rows(config, **sizes)


def test_standard_output_that_is_closed_or_full(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    code = "from vllm_ascend.cli import main; main()"
    command = [sys.executable, "-c", code, "explain", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=1800)
    assert (done.returncode, done.stderr) == (
        1,
        "error: standard output cannot be written: No space left on device\n",
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=1800)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]  # from the start
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False, timeout=1800)
    assert (done.returncode, done.stderr) == (0, "")
