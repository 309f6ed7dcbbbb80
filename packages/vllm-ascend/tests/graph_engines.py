# SPDX-License-Identifier: Apache-2.0
"""`nox -s graphs`: captured decoding steps over more arrangements of ranks and options than the default tests have."""

import pytest
from engine_jobs import BLOCK_BYTES, GREEDY, ONE_PROCESS, captured, tokens

INSPECTED = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def test_three_ranks(smollm2, prompts, greedy, run_engines):
    job = {"engine": captured(smollm2, tensor_parallel_size=3), "runs": [{"prompts": prompts, "sampling": GREEDY}]}
    (result,) = run_engines([job | {"inspect": True}], **INSPECTED)
    assert tokens(result) == greedy
    assert len({counts["replays"] for counts in result["graphs"]}) == 1
    assert result["graphs"][0]["replays"] > 20


@pytest.mark.parametrize("options", [{"async_scheduling": False}, {"max_num_batched_tokens": 16}], ids=str)
def test_scheduling(options, smollm2, prompts, greedy, run_engines):
    job = {"engine": captured(smollm2, **options), "runs": [{"prompts": prompts, "sampling": GREEDY}]}
    (result,) = run_engines([job], **ONE_PROCESS)
    assert tokens(result) == greedy


def test_batches_above_the_largest_size(smollm2, prompts, greedy, run_engines):
    """Steps of more than two requests run operator by operator."""
    sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]}
    engine = captured(smollm2, compilation_config=sizes)
    (result,) = run_engines([{"engine": engine, "runs": [{"prompts": prompts, "sampling": GREEDY}]}], **ONE_PROCESS)
    assert tokens(result) == greedy


def test_preemption(smollm2, prompts, run_engines):
    """Room for 4 blocks of 128 tokens, and 8 requests that begin in one block each and grow into a second."""
    runs = [{"prompts": [(ids * 8)[:120] for ids in prompts], "sampling": GREEDY}]
    starved = captured(smollm2, max_model_len=256, kv_cache_memory_bytes=5 * BLOCK_BYTES)
    eager = captured(smollm2, compilation_config={"cudagraph_mode": "NONE"})
    starved, eager = run_engines([{"engine": starved, "runs": runs}, {"engine": eager, "runs": runs}], **ONE_PROCESS)
    assert starved["preemptions"] > 0
    assert tokens(starved) == tokens(eager)


def test_what_is_not_captured_runs_operator_by_operator(smollm2, prompts, greedy, run_engines):
    """Here an option of ours that no test has shown to compute the same."""
    engine = captured(smollm2, additional_config={"weight_prefetch_config": {"enabled": True}})
    job = {"engine": engine, "runs": [{"prompts": prompts[:2], "sampling": GREEDY}], "inspect": True}
    (result,) = run_engines([job], **ONE_PROCESS, **INSPECTED)
    assert tokens(result) == greedy[:2]
    assert result["graphs"][0]["replays"] == 0
