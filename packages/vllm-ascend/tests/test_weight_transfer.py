# SPDX-License-Identifier: Apache-2.0
"""Weights that a trainer sends into an engine that runs: tokens equal Hugging Face's of the trainer's model, and no failure of either side leaves the other waiting."""

import json
import os
import subprocess
import sys

import pytest
import torch
from engine_jobs import GREEDY, SMALL
from engine_processes import ENVIRONMENT, HERE, LIMIT, start, wait
from moe_families import TOKENS, made_families
from served import Server, running
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
SAMPLING = GREEDY | {"max_tokens": TOKENS, "detokenize": False}
TINY = SMALL | {"max_model_len": 256, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 64 << 20, "skip_tokenizer_init": True}  # fmt: skip
PACKED, SINGLE = {"packed_buffer_size_bytes": 100_000}, {"packed": False}


@pytest.fixture
def run(tmp_path):
    """Run a job of `weight_transfer_engines.py`; returns what was said and answered before the first round and after each."""

    def run_job(job, **env):
        files = [tmp_path / "job.json", tmp_path / "result.json"]
        files[0].write_text(json.dumps(job))
        command = [sys.executable, str(HERE / "weight_transfer_engines.py"), *map(str, files)]
        said = tmp_path / "said.txt"
        wait([start(command, said, {"ASCEND_SIM_STRICT": "0", **env})], [said])
        return json.loads(files[1].read_text())

    return run_job


def trained(folder, prompts, hugging_face, where, seed):
    """A model of the same shape with other weights: its folder, and Hugging Face's tokens."""
    torch.manual_seed(seed)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num(1.0) / 2)
        model.save_pretrained(where)
        return where, hugging_face(model, prompts, TOKENS)


@pytest.fixture(scope="module")
def qwen3(tiny_qwen3, hugging_face, tmp_path_factory):
    """Folder, prompts, tokens, and two trained models of `tiny_qwen3`."""
    folder, prompts, tokens = tiny_qwen3
    others = [trained(folder, prompts, hugging_face, tmp_path_factory.mktemp("trained"), seed) for seed in (1, 2)]
    return folder, prompts, [answer[:TOKENS] for answer in tokens], others


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_rounds_of_a_dense_model(ranks, qwen3, run):
    """Packed in several buffers, one by one, and again; captured steps replay with the new weights."""
    folder, prompts, before, ((first, expected), (second, others)) = qwen3
    rounds = [
        {"weights": str(first), "wire": PACKED},
        {"weights": str(second), "leaves": True},
        {"weights": str(first), "wire": SINGLE},
    ]
    engine = {"model": str(folder), **TINY, "tensor_parallel_size": ranks}
    results = run({"engine": engine, "prompts": prompts, "sampling": SAMPLING, "rounds": rounds})
    assert [one["said"] for one in results] == [None] * 4
    assert [one["tokens"] for one in results] == [before, expected, others, expected]


def test_failures_end_on_both_sides(qwen3, run):
    """Each round fails in a way of its own, and the one after it succeeds. The engine answers after each."""
    folder, prompts, _, ((first, expected), (second, _)) = qwen3
    wrong = ["source", "name", "shape", "part"]
    rounds = [{"weights": str(second), "wrong": kind, "wire": PACKED} for kind in wrong]
    rounds.append({"weights": str(first), "wire": PACKED})
    engine = {"model": str(folder), **TINY, "tensor_parallel_size": 2}
    said = run({"engine": engine, "prompts": prompts, "sampling": SAMPLING, "rounds": rounds})
    assert said[1]["said"] == ["ArithmeticError", "the trainer's own"]
    assert "nowhere" in said[2]["said"][1]
    assert "does not have the shape" in said[3]["said"][1]
    assert "what the trainer has sent lacks 1 of the tensors" in said[4]["said"][1]
    assert "up_proj" in said[4]["said"][1]
    assert said[5] == {"said": None, "tokens": expected}


@pytest.mark.long
def test_experts_and_latent_attention(tmp_path_factory, hugging_face, run):
    """Experts in the slots of their ranks, and the copies of weights that latent attention derives."""
    folder, prompts, before = made_families(tmp_path_factory.mktemp, hugging_face)["deepseek_v3"]
    other, expected = trained(folder, prompts, hugging_face, tmp_path_factory.mktemp("trained"), 3)
    engine = {"model": str(folder), **TINY, "tensor_parallel_size": 2, "enable_expert_parallel": True}
    rounds = [{"weights": str(other), "wire": PACKED}]
    results = run({"engine": engine, "prompts": prompts, "sampling": SAMPLING, "rounds": rounds})
    assert [one["tokens"] for one in results] == [before, expected]


def test_a_device_is_given_once(qwen3, run):
    folder, prompts, before, ((first, _), _) = qwen3
    engine = {"model": str(folder), **TINY}
    job = {"engine": engine, "prompts": prompts, "sampling": SAMPLING, "rounds": [{"weights": str(first)}], "device": 0}
    said = run(job)
    assert said[1]["said"][1].startswith("ranks 0 and 1 of the transfer are on one NPU (device 0 of ")
    assert said[1]["tokens"] == before


# A trainer that is killed when half of its tensors are sent.
KILLED = """
import os, signal, sys
import torch, torch_npu
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm_ascend.weight_transfer.trainer import HCCLTrainerInitInfo, HCCLTrainerWeightTransferEngine

torch.npu.set_device(1)
weight = torch.zeros(576, dtype=torch.bfloat16, device="npu")

class Source(WeightSource):
    def metadata(self):
        return [ParamMeta(f"model.layers.{layer}.input_layernorm.weight", weight.dtype, (576,)) for layer in range(2)]

    def __iter__(self):
        yield "model.layers.0.input_layernorm.weight", weight
        os.kill(os.getpid(), signal.SIGKILL)

info = HCCLTrainerInitInfo("127.0.0.1", 0, 2, packed=False, rank=0)
HCCLTrainerWeightTransferEngine.trainer_init(info, client=HTTPVLLMWeightSyncClient(sys.argv[1]), source=Source()).send_weights()
"""


@pytest.mark.long
def test_a_server_learns_and_outlives_a_trainer(smollm2, tmp_path):
    """A trainer is killed while it sends; the example's trainer then teaches the server a sentence."""
    options = ["--max-model-len", "512", "--kv-cache-memory-bytes", str(128 << 20), "--weight-transfer-config", '{"backend": "hccl"}']  # fmt: skip
    server = Server(smollm2, tmp_path / "server.txt", *options, env={"VLLM_SERVER_DEV_MODE": "1"})
    with running({"server": server}, never="EngineDeadError"):
        address = str(server.http.base_url)

        def answer():
            said = server.post("/v1/completions", prompt="The capital of France is", max_tokens=2, temperature=0)
            return said.json()["choices"][0]["text"]

        def trainer(*command):
            return subprocess.run(
                [sys.executable, *command], env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
            )

        before = answer()
        assert "Lyon" not in before
        assert trainer("-c", KILLED, address).returncode == -9
        assert server.is_alive()
        done = trainer(str(HERE.parents[2] / "examples" / "train_and_serve.py"), str(smollm2), "--url", address)
        assert done.returncode == 0, done.stdout + done.stderr
        assert answer() == " Lyon."
