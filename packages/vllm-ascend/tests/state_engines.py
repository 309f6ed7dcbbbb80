# SPDX-License-Identifier: Apache-2.0
"""Models with a recurrent state over pipeline stages and over data parallel replicas, beside transformers. `nox -s states` runs this file."""

import pytest
import torch
from engine_jobs import ONE_PROCESS, tokens
from zoo import ENTRIES, reference
from zoo.trial import SMALL

pytestmark = pytest.mark.slow
NAMES = ("Qwen3Next", "Jamba", "FalconH1", "GraniteMoeHybrid", "Mamba2")
SAMPLING = {"temperature": 0, "max_tokens": reference.NEW_TOKENS, "ignore_eos": True, "detokenize": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> folder, prompts and transformers' greedy tokens."""
    found = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        with torch.inference_mode():
            model, requests, _ = reference.checkpoint(ENTRIES[name], folder)
            prompts = [request["ids"] for request in requests]
            found[name] = folder, prompts, [reference.greedy(model, ids, {})[0] for ids in prompts]
    return found


def job(made, name, prompts, **parallel):
    engine = {"dtype": "float32", **SMALL, **ENTRIES[name].engine, "model": str(made[name][0]), "skip_tokenizer_init": True, **parallel}  # fmt: skip
    return {"engine": engine, "runs": [{"prompts": prompts, "sampling": SAMPLING}]}


# vLLM itself has no stages for Mamba2, and loads the router of every layer on every stage of a Granite: both are refused at the start.
@pytest.mark.parametrize("name", ["Qwen3Next", "Jamba", "FalconH1"])
def test_two_pipeline_stages(made, run_engines, name):
    _, prompts, expected = made[name]
    whole, chunked = run_engines(
        [
            job(made, name, prompts, pipeline_parallel_size=2),
            job(made, name, prompts, pipeline_parallel_size=2, max_num_batched_tokens=32),
        ]
    )
    assert tokens(whole) == tokens(chunked) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if ENTRIES[name].experts])
def test_replicas_that_share_experts(made, run_replicas, name):
    """One has all prompts but the first and goes on when the other, which has that one alone, is idle."""
    _, prompts, expected = made[name]
    shares = (slice(0, 1), slice(1, None))
    jobs = [[job(made, name, prompts[share], enable_expert_parallel=True)] for share in shares]
    for share, (result,) in zip(shares, run_replicas(jobs, **ONE_PROCESS), strict=True):
        assert tokens(result) == expected[share]
