# SPDX-License-Identifier: Apache-2.0
"""Real weights, and engines in processes of their own."""

import logging
import os
import sys
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():  # torch_npu's own sources warn while they are compiled
    warnings.simplefilter("ignore")
    import torch  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside the tests

from engine_processes import EngineServers, data_parallel, processes_of_session, rendezvous, wait_for_engines

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "How many days are in a week?",
    "What is 2 + 2?",
    "Tell me a short story about a fox.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
]


@pytest.fixture
def caplog(caplog, monkeypatch):
    """pytest's, which sees what loggers below vLLM's say as well: vLLM lets nothing pass to the root."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def alive():
    """`processes_of_session`, for tests."""
    return processes_of_session


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Where checkpoints are made, and kept if the variable says so."""
    root = os.environ.get("ASCEND_TEST_MODELS")
    return Path(root) if root else tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def smollm2(models):
    """Folder of the real SmolLM2-135M-Instruct checkpoint."""
    from ascend_sim.checkpoints import smollm2

    return smollm2(models / "smollm2")


@pytest.fixture(scope="session")
def prompts(smollm2):
    """Token ids of the questions, in the model's chat format."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in QUESTIONS
    ]


@pytest.fixture(scope="session")
def engine_servers(tmp_path_factory):
    """Where jobs are started."""
    servers = EngineServers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.close()


@pytest.fixture
def run_engines(tmp_path, engine_servers):
    """Run a job of `run_engine.py`; returns its results."""

    def run(job, **env):
        folder = tmp_path / "engines"
        return wait_for_engines([engine_servers.start_engines(job, folder, env)], [folder])[0]

    return run


@pytest.fixture
def run_replicas(tmp_path, engine_servers):
    """Run one job of `run_engine.py` for each data parallel rank, side by side; returns the results of each."""

    def run(jobs, **env):
        stores = [rendezvous() for _ in jobs[0]]
        folders = [tmp_path / f"replica{rank}" for rank in range(len(jobs))]
        processes = []
        for rank, (job, folder) in enumerate(zip(jobs, folders, strict=True)):
            job = [engine | {"rendezvous": store.port} for engine, store in zip(job, stores, strict=True)]
            environment = env | data_parallel(rank, len(jobs))
            processes.append(engine_servers.start_engines(job, folder, environment))
        return wait_for_engines(processes, folders)

    return run


def hugging_face_greedy(model, prompts, length):
    """Greedy tokens of Hugging Face transformers, one prompt at a time."""
    import torch

    answers = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=length,
            do_sample=False, eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        answers.append(out[0, len(ids) :].tolist())
    return answers


@pytest.fixture(scope="session")
def hugging_face():
    """The function above, for tests."""
    return hugging_face_greedy


@pytest.fixture(scope="session")
def greedy(smollm2, prompts):
    """Hugging Face's answers, 32 tokens each, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        return hugging_face_greedy(model, prompts, 32)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory):
    """A random Qwen3 of 4 layers: its folder, prompts of 5 to 59 tokens, and Hugging Face's 32 greedy tokens for each."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen3")
    prompts = [[(7 * i * i + 3 * k) % 512 for i in range(5 + 9 * k)] for k in range(7)]
    with torch.inference_mode():
        model = Qwen3ForCausalLM(config).float().eval()
        model.save_pretrained(folder)
        return folder, prompts, hugging_face_greedy(model, prompts, 32)
