# SPDX-License-Identifier: Apache-2.0
"""`nox -s adapters`: LoRA, sleep mode and engines that a launcher starts, over more models and arrangements of ranks than the default tests have."""

import json
import os
import shutil
import subprocess
import sys

import openai
import peft
import pytest
import torch
import weight_only_models
from engine_jobs import GREEDY, ONE_PROCESS, captured, tokens
from engine_processes import LIMIT, end, listening_port, start
from int8_models import PROMPTS, quantise_statically
from lora_adapters import ALL, make, side_by_side
from vllm_ascend.quantization.linear import float_scale

INSPECTED = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
LENGTH = 16
SAMPLING = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False}
TINY = {
    "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True, "enable_lora": True, "max_loras": 2, "max_lora_rank": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tiny_qwen3, hugging_face, tmp_path_factory):
    folder, prompts, _ = tiny_qwen3
    wanted = {"8": (8, ALL), "64": (64, ALL), "vocabulary": (16, ("down_proj", "embed_tokens", "lm_head"))}
    return make(tmp_path_factory.mktemp("adapters"), folder, prompts[:3], LENGTH, hugging_face, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "fully_sharded_loras": True},
        {"pipeline_parallel_size": 2},
    ],
    ids=["tp2", "tp2-sharded", "pp2"],
)
def test_adapters_over_ranks(options, adapters, tiny_qwen3, run_engines):
    folder, prompts, _ = tiny_qwen3
    names = ["base", "8", "64"] if "pipeline_parallel_size" in options else ["base", *adapters.folders]
    job, said = side_by_side(adapters, prompts[:3], names, SAMPLING)
    (result,) = run_engines([{"engine": {"model": str(folder), **TINY, **options}, "runs": [job]}])
    assert tokens(result) == said


def test_logprobs_of_prompts_are_the_adapters(adapters, tiny_qwen3, run_engines):
    """A request alone, and beside others, in chunks of prompts."""
    folder, prompts, _ = tiny_qwen3
    together, _ = side_by_side(adapters, prompts[:3], ["base", "vocabulary"], SAMPLING | {"prompt_logprobs": 0})
    alone = [
        {"prompts": [ids], "adapters": [name], "sampling": together["sampling"]}
        for ids, name in zip(together["prompts"], together["adapters"], strict=True)
    ]
    engine = {"model": str(folder), **TINY, "max_num_batched_tokens": 16}
    (result,) = run_engines([{"engine": engine, "runs": [together, *alone]}], **ONE_PROCESS)
    ranks = [[[rank for _, rank in output["prompt_tokens"]] for output in outputs] for outputs in result["runs"]]
    assert [only for (only,) in ranks[1:]] == ranks[0]
    assert ranks[0][0] != ranks[0][1]


def test_adapters_of_a_real_model(smollm2, prompts, hugging_face, tmp_path, run_engines):
    """Its embedding is its LM head."""
    made = make(tmp_path, smollm2, prompts[:3], LENGTH, hugging_face, {"32": (32, ALL)})
    job, said = side_by_side(made, prompts[:3], ["base", "32"], SAMPLING)
    (result,) = run_engines([{"engine": {"model": str(smollm2), **TINY, "max_model_len": 512}, "runs": [job]}], **ONE_PROCESS)  # fmt: skip
    assert tokens(result) == said


def test_adapters_beside_experts(smollm2, models, prompts, hugging_face, tmp_path, run_engines):
    """The other layers of a mixture of experts."""
    from ascend_sim.checkpoints import upcycle

    folder = upcycle(smollm2, models / "smollm2-moe", experts=8, top_k=2)
    made = make(tmp_path, folder, prompts[:2], LENGTH, hugging_face, {"8": (8, ALL[:4])})
    job, said = side_by_side(made, prompts[:2], ["base", "8"], SAMPLING)
    engine = {"model": str(folder), **TINY, "max_model_len": 512, "lora_target_modules": list(ALL[:4])}
    (result,) = run_engines([{"engine": engine, "runs": [job]}], **ONE_PROCESS)
    assert tokens(result) == said


def test_an_engine_with_graphs_sleeps(smollm2, prompts, greedy, run_engines):
    """Graphs are replayed on the addresses at which they were captured."""
    runs = [{"prompts": prompts, "sampling": GREEDY}]
    runs += [runs[0] | {"before": [["sleep", 1], ["wake_up"]]}]
    runs += [runs[0] | {"before": [["sleep", 2], ["wake_up", ["weights"]], ["reload"], ["wake_up", ["kv_cache"]]]}]
    engine = captured(smollm2, enable_sleep_mode=True)
    (result,) = run_engines([{"engine": engine, "runs": runs, "inspect": True}], **ONE_PROCESS, **INSPECTED)
    assert [tokens(result, number) for number in range(3)] == [greedy] * 3
    awake = result["actions"][1][1]["memory"]
    for actions in result["actions"][1:]:
        assert [one["said"] for one in actions] == [None] * len(actions)
        assert actions[0]["memory"][0] < awake[0] - (256 << 20)  # the KV cache
        assert actions[-1]["memory"] == awake
    assert result["graphs"][0]["replays"] > 60


@pytest.fixture(scope="module")
def gemma4(hugging_face, tmp_path_factory):
    """A Gemma 4 whose layers have heads of two sizes: folder, prompts, and an adapter for it."""
    from zoo import ENTRIES, reference

    folder = tmp_path_factory.mktemp("gemma4")
    with torch.inference_mode():
        _, requests, _ = reference.checkpoint(ENTRIES["Gemma4"], folder)
    prompts = [request["ids"] for request in requests]
    return folder, prompts, make(folder / "adapters", folder, prompts, LENGTH, hugging_face, {"8": (8, ALL)})


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_whose_heads_differ(ranks, gemma4, run_engines):
    """Adapters side by side, and again after either level of sleep."""
    folder, prompts, made = gemma4
    job, said = side_by_side(made, prompts, ["base", "8"], SAMPLING)
    assert made.tokens["8"] == made.merged["8"] != made.tokens["base"]
    sleeps = (
        [["sleep", 1], ["wake_up"]],
        [["sleep", 2], ["wake_up", ["weights"]], ["reload"], ["wake_up", ["kv_cache"]]],
    )
    runs = [job, *(job | {"before": actions} for actions in sleeps)]
    engine = {"model": str(folder), **TINY, "enable_sleep_mode": True, "tensor_parallel_size": ranks}
    (result,) = run_engines([{"engine": engine, "runs": runs}])
    assert [tokens(result, number) for number in range(3)] == [said] * 3


def as_compressed(modelslim, folder, *, static):
    """A ModelSlim checkpoint as compressed-tensors would have it: the same int8 weights and scales."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(modelslim, folder)
    file = folder / "quant_model_weights.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".deq_scale")]:
        layer = name.removesuffix(".deq_scale")
        scale = tensors.pop(f"{layer}.input_scale")
        tensors[f"{layer}.weight_scale"] = (float_scale(tensors.pop(name)) / scale)[:, None]
        tensors |= {f"{layer}.input_scale": scale.float().reshape(1), f"{layer}.input_zero_point": tensors.pop(f"{layer}.input_offset").to(torch.int8).reshape(1)}  # fmt: skip
        del tensors[f"{layer}.quant_bias"]
    save_file({name: x for name, x in tensors.items() if not name.endswith("weight_offset")}, folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    file.unlink()
    (folder / "quant_model_description.json").unlink()
    inputs = {"dynamic": False, "strategy": "tensor", "symmetric": False} if static else {"dynamic": True, "strategy": "token", "symmetric": True}  # fmt: skip
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}, "input_activations": {"num_bits": 8, "type": "int", **inputs}}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"], "config_groups": {"group_0": group}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def small_qwen3(folder):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(4)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=500, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=128,
        max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
    )).float().eval()  # fmt: skip
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_int8_of_compressed_tensors(ranks, static, tmp_path, run_engines):
    """The tokens of the same weights in ModelSlim's form. Its weights are kept after a sleep without them.

    Of two ranks with static scales, ModelSlim's first adds what the offset asks for of all inputs, and each of compressed-tensors its own part: partial products round otherwise.
    """
    from ascend_sim.checkpoints import quantise

    model = small_qwen3(tmp_path / "float")
    if static:
        modelslim = quantise_statically(model, tmp_path / "float", tmp_path / "modelslim", PROMPTS[:1])
    else:
        modelslim = quantise(tmp_path / "float", tmp_path / "modelslim", keep_float=("lm_head",))
    folder = as_compressed(modelslim, tmp_path / "compressed", static=static)
    sampling = {"prompts": PROMPTS[:4], "sampling": SAMPLING | {"logprobs": 3}}
    asleep = sampling | {"before": [["sleep", 2], ["wake_up", ["weights"]], ["reload"], ["wake_up", ["kv_cache"]]]}
    engine = {name: value for name, value in TINY.items() if "lora" not in name}
    engine |= {"tensor_parallel_size": ranks, "dtype": "bfloat16"}
    jobs = [
        {"engine": engine | {"model": str(modelslim)}, "runs": [sampling]},
        {"engine": engine | {"model": str(folder), "enable_sleep_mode": True}, "runs": [sampling, asleep]},
    ]
    expected, result = run_engines(jobs, **ONE_PROCESS)
    assert [one["said"] for one in result["actions"][1]] == [None] * 4
    assert tokens(result, 1) == tokens(result)
    if static and ranks > 1:
        assert_same_until_a_tie(result["runs"][0], expected["runs"][0])
    else:
        assert tokens(result) == tokens(expected)


def assert_same_until_a_tie(outputs, others):
    """Each pair of outputs has the same tokens, or the first two that differ lie no further apart than rounding has moved the likely ones of that step."""
    for output, other in zip(outputs, others, strict=True):
        steps = zip(output["tokens"], other["tokens"], output["logprobs"], other["logprobs"], strict=True)
        for mine, its, here, there in steps:
            if mine != its:
                moved = max(abs(here[token] - there[token]) for token in here.keys() & there.keys())
                assert there[str(its)] - there[str(mine)] <= 2 * moved
                break


@pytest.mark.parametrize("form", ["modelslim", "compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_of_quantised_layers(ranks, form, tmp_path, run_engines):
    """vLLM's LoRA layers call the product of a quantised layer themselves: without an adapter it is what it is in an engine that has none. (What adapters add to it is in docs/features.md.)"""
    folder = tmp_path / form
    if form in ("gptq", "awq"):
        model = weight_only_models.make(folder, getattr(weight_only_models, form), 4, symmetric=form == "gptq")
    else:
        model = small_qwen3(tmp_path / "float")
        modelslim = quantise_statically(model, tmp_path / "float", tmp_path / "modelslim", PROMPTS[:1])
        folder = modelslim if form == "modelslim" else as_compressed(modelslim, folder, static=True)
    torch.manual_seed(8)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(ALL), init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    asked = {"prompts": PROMPTS[:4], "sampling": SAMPLING}
    runs = [asked | {"adapters": [each] * 4} for each in (None, str(tmp_path / "adapter"))]
    engine = TINY | {"model": str(folder), "dtype": "bfloat16", "tensor_parallel_size": ranks}
    without = {name: value for name, value in engine.items() if "lora" not in name}
    jobs = [{"engine": without, "runs": [asked]}, {"engine": engine, "runs": runs}]
    expected, result = run_engines(jobs, **ONE_PROCESS)
    assert tokens(result) == tokens(expected)
    assert all(one != other for one, other in zip(tokens(result), tokens(result, 1), strict=True))


LAUNCHED = """
import json, os, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(folder, distributed_executor_backend="external_launcher", tensor_parallel_size=int(os.environ["WORLD_SIZE"]), dtype="float32", max_model_len=256, max_num_seqs=8,
    max_num_batched_tokens=64, kv_cache_memory_bytes=64 << 20, skip_tokenizer_init=True, enforce_eager=True, seed=0)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False))
print("RANK" + os.environ["RANK"] + json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_external_launcher(ranks, tiny_qwen3, tmp_path):
    """torchrun starts the ranks, each with an engine of its own, that share the model; four of them share two heads of keys and values."""
    folder, prompts, expected = tiny_qwen3
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script), str(folder), json.dumps(prompts[:3])]  # fmt: skip
    environment = os.environ | {"ASCEND_SIM_STRICT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(ranks):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"RANK{rank}"))
        assert json.loads(line.removeprefix(f"RANK{rank}")) == [answer[:16] for answer in expected[:3]]


@pytest.fixture
def server(tiny_qwen3, tmp_path):
    """A server that takes adapters, and sleeps, when it is asked to."""
    log = tmp_path / "log.txt"
    options = ["--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20), "--dtype", "float32", "--skip-tokenizer-init"]  # fmt: skip
    features = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "64", "--enable-sleep-mode"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tiny_qwen3[0]), "--served-model-name", "base", "--port", "0", "--host", "127.0.0.1"]  # fmt: skip
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1", "ASCEND_SIM_STRICT": "0"}
    process = start([*command, *options, *features], log, environment)

    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{listening_port(process, log)}/v1", api_key="none", timeout=LIMIT)  # fmt: skip
        yield client
        client.close()
    finally:
        end(process)


def test_adapters_and_sleep_through_the_api(server, adapters, tiny_qwen3):
    """Token ids in, token ids out: the model has no tokenizer."""
    prompt = tiny_qwen3[1][0]

    def post(path, **body):
        return server.post(f"{str(server.base_url).removesuffix('v1/')}{path}", body=body, cast_to=object)

    def complete(model):
        extra = {"return_token_ids": True, "ignore_eos": True}
        answer = server.completions.create(model=model, prompt=prompt, max_tokens=LENGTH, temperature=0, extra_body=extra)  # fmt: skip
        return answer.choices[0].token_ids

    assert complete("base") == adapters.tokens["base"][0]
    for name in ("8", "64"):
        post("v1/load_lora_adapter", lora_name=name, lora_path=adapters.folders[name])
        assert complete(name) == adapters.tokens[name][0]
    post("v1/unload_lora_adapter", lora_name="8")
    with pytest.raises(openai.NotFoundError, match="8"):
        complete("8")
    post("sleep?level=1")
    post("wake_up")
    assert complete("64") == adapters.tokens["64"][0]
    assert complete("base") == adapters.tokens["base"][0]
