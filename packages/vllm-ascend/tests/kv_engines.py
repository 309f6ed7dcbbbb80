# SPDX-License-Identifier: Apache-2.0
"""`nox -s kv`: KV offload over the models, arrangements of ranks and options that the default tests leave out, and prefill apart from decode."""

import json

import pytest
import torch
from engine_jobs import tokens
from kv_prompts import (
    CACHED,
    LENGTH,
    OTHERS,
    PROMPTS,
    SAMPLING,
    SIZE,
    VOCABULARY,
    after_eviction,
    assert_loaded,
    from_host,
    offloading,
    qwen3,
)
from lora_adapters import ALL, make, side_by_side
from moe_families import LATENT
from pooling_models import save_tokenizer
from prefill_decode import EXAMPLE, apart, computed, nixl_hosts

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 1024, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 160, "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
# Class of transformers, and what its config has.
MODELS = {
    "a window in all layers": ("Mistral", TEXT | {"sliding_window": 160}),
    "windows in some layers": ("Gemma3", TEXT | WINDOW),
    "layers whose heads differ": ("Gemma4", TEXT | WINDOW | {"global_head_dim": 128, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}),
    "latent attention": ("DeepseekV3", TEXT | LATENT | EXPERTS | {"num_key_value_heads": 4, "q_lora_rank": 48, "first_k_dense_replace": 1}),
}  # fmt: skip


@pytest.fixture
def made(tmp_path, hugging_face):
    """Makes a model of the table: its folder and transformers' tokens of PROMPTS."""

    def make(kind):
        import transformers

        name, config = MODELS[kind]
        text = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
        torch.manual_seed(1)
        config = {key: value for key, value in config.items() if name != "DeepseekV3" or key != "head_dim"}
        with torch.inference_mode():
            model = getattr(transformers, f"{name}ForCausalLM")(text(**config)).float().eval()
            model.save_pretrained(tmp_path / "model")
            return tmp_path / "model", hugging_face(model, PROMPTS, LENGTH)

    return make


@pytest.fixture
def made_qwen3(tmp_path, hugging_face):
    """Folder of the model of `kv_prompts.py`, and transformers' tokens of PROMPTS."""
    return qwen3(tmp_path / "qwen3", hugging_face)


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind, made, run_engines):
    """Where layers have windows, each kind of them has blocks of its own; where heads differ, blocks are of 256 tokens."""
    folder, expected = made(kind)
    blocks = {"num_gpu_blocks_override": 20} if kind == "windows in some layers" else {}
    (result,) = run_engines([after_eviction(folder, kv_offloading_size=SIZE, **blocks)])
    assert_loaded(result, expected, [256, 0, 256, 0, 0] if kind == "layers whose heads differ" else CACHED)


@pytest.mark.parametrize("kind", [None, "latent attention"])
def test_two_ranks(kind, made, made_qwen3, run_engines):
    folder, expected = made(kind) if kind else made_qwen3
    (result,) = run_engines([after_eviction(folder, kv_transfer_config=offloading(), tensor_parallel_size=2)])
    assert_loaded(result, expected)


# What is changed in the engine, and what the repeated prompts find in host memory.
OPTIONS = {
    "chunks of prompts": ({"max_num_batched_tokens": 96, "async_scheduling": False}, CACHED),
    "no prefix cache on the device": ({"enable_prefix_caching": False}, CACHED),
    "larger blocks": ({"block_size": 256, "num_gpu_blocks_override": 5}, [256, 0, 256, 0, 0]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, made_qwen3, run_engines):
    folder, expected = made_qwen3
    options, cached = OPTIONS[name]
    (result,) = run_engines([after_eviction(folder, kv_offloading_size=SIZE, **options)])
    assert_loaded(result, expected, cached)


def test_preempted_requests(made_qwen3, run_engines):
    """Requests that lose their blocks while they answer: their stores are complete before others write there, and they go on from host memory."""
    folder, _ = made_qwen3
    runs = [{"prompts": [*PROMPTS, *OTHERS], "sampling": SAMPLING | {"max_tokens": 140}}] * 2
    engine = after_eviction(folder, max_num_seqs=8, max_num_batched_tokens=256)["engine"]
    plain, offloaded = run_engines([{"engine": engine | more, "runs": runs} for more in ({"num_gpu_blocks_override": 64}, {"kv_offloading_size": SIZE})])  # fmt: skip
    assert plain["preemptions"] == 0 < offloaded["preemptions"]
    assert tokens(offloaded) == tokens(offloaded, 1) == tokens(plain)
    assert from_host(offloaded, 1) > 0


def test_host_memory_that_is_full(made_qwen3, run_engines):
    """It has room for five of eight blocks: what was used last stays, and what has left is computed."""
    folder, expected = made_qwen3
    block = 4 * 2 * 128 * 2 * 64 * 4  # layers x (key, value) x tokens x heads x head size x float32
    job = after_eviction(folder, others=OTHERS[:1], kv_transfer_config=offloading(cpu_bytes_to_use=5 * block))
    job["runs"][2] |= {"prompts": [PROMPTS[i] for i in (2, 3, 0)], "before": [["forget"]]}
    (result,) = run_engines([job])
    assert tokens(result) == expected
    assert tokens(result, 2) == [expected[i] for i in (2, 3, 0)]
    assert [output["cached"] for output in result["runs"][2]] == [256, 128, 0]
    assert from_host(result, 2) == 256 + 128


def test_adapters(made_qwen3, hugging_face, tmp_path, run_engines):
    """The same prompts by the model and by an adapter, whose keys and values differ: each finds its own."""
    folder, expected = made_qwen3
    adapters = make(tmp_path / "adapters", folder, PROMPTS, LENGTH, hugging_face, {"one": (8, ALL)})
    names = ["one", "base"]
    assert adapters.tokens["base"] == expected
    asked, said = side_by_side(adapters, PROMPTS, names, SAMPLING)
    job = after_eviction(folder, kv_offloading_size=SIZE, enable_lora=True, max_lora_rank=8)
    job["runs"] = [asked, {**job["runs"][1], "adapters": [None] * len(OTHERS)}, asked]
    (result,) = run_engines([job])
    assert_loaded(result, said, [count for count in CACHED for _ in names])


def test_host_memory_that_is_dropped(made_qwen3, run_engines):
    """As it must be after new weights: everything is computed."""
    folder, expected = made_qwen3
    job = after_eviction(folder, kv_offloading_size=SIZE)
    job["runs"].append({**job["runs"][0], "before": [["forget_all"]]})
    (result,) = run_engines([job])
    assert_loaded(result, expected)
    assert tokens(result, 3) == expected
    assert [output["cached"] for output in result["runs"][3]] == [0] * len(PROMPTS)


def test_memory_for_no_block(made_qwen3, engine_servers, tmp_path):
    """One clear error."""
    job = [after_eviction(made_qwen3[0], kv_transfer_config=offloading(cpu_bytes_to_use=1000))]
    process = engine_servers.start_engines(job, tmp_path / "engines", {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    process.wait()
    said = (tmp_path / "engines" / "said.txt").read_text()
    assert process.returncode != 0
    assert "1000 bytes of host memory (kv_offloading_size, or cpu_bytes_to_use of kv_connector_extra_config) hold no chunk of the KV cache, of 524288 bytes" in said  # fmt: skip


# Connector, options of the servers, and how many tokens at the end of a prompt of `n` the decode server computes. Of NIXL's all have come, whatever is computed anew for a first
# logit.
APART = {
    "files": ("ExampleConnector", EXAMPLE, lambda n: n - (n - 2) // 128 * 128),
    "NIXL": ("NixlConnector", [], lambda n: 0),
    "NIXL over two ranks": ("NixlConnector", ["--tensor-parallel-size", "2"], lambda n: 0),
}


@pytest.mark.parametrize("kind", APART)
def test_prefill_apart_from_decode(kind, made_qwen3, tmp_path):
    """The tokens of one model, of which the server that decodes computes no more than the last block of each prompt; streamed and not, and an error as it came."""
    connector, options, rest = APART[kind]
    transfer, hosts = {"kv_connector": connector}, (None, None)
    if connector == "NixlConnector":
        pytest.importorskip("nixl")
        hosts = nixl_hosts()
    else:
        transfer["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}
    folder, expected = made_qwen3
    save_tokenizer(folder)
    small = {"dtype": "float32", "max-model-len": 512, "max-num-seqs": 4, "kv-cache-memory-bytes": 64 << 20, "max-num-batched-tokens": 1024}  # fmt: skip
    given = [str(word) for name, value in small.items() for word in (f"--{name}", value)]
    with apart(folder, tmp_path, transfer, *given, *options, hosts=hosts) as (client, servers):
        for prompt, said in zip(PROMPTS, expected, strict=True):
            before = {name: computed(server) for name, server in servers.items()}
            ask = {"model": "model", "prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "return_token_ids": True}  # fmt: skip
            answer = client.post("/v1/completions", json=ask)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["token_ids"] == said
            after = {name: computed(server) - before[name] for name, server in servers.items()}
            assert after == {"prefill": len(prompt), "decode": rest(len(prompt))}
        streamed = client.post("/v1/completions", json={**ask, "stream": True}).text
        parts = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")]  # fmt: skip
        assert [token for part in parts for token in part["choices"][0]["token_ids"] or []] == expected[-1]
        assert client.post("/v1/completions", json={**ask, "temperature": -1}).status_code == 400
        assert client.get("/v1/models").json()["data"][0]["id"] == "model"
