# SPDX-License-Identifier: Apache-2.0
"""Tokens of captured decoding steps against Hugging Face transformers; `nox -s graphs` has more models and arrangements of ranks (graph_engines.py)."""

import pytest
from engine_jobs import GREEDY, ONE_PROCESS, captured, tokens

pytestmark = pytest.mark.slow


def test_one_process(smollm2, prompts, greedy, run_engines):
    """Batches that grow and shrink across the sizes, prompts that join while others decode, prefixes from the cache, and seeds."""
    staggered = [ids for ids in prompts for _ in range(2)]  # 16 requests for 8 places
    long = {"prompts": [(ids * 8)[:300] for ids in prompts[:3]], "sampling": GREEDY}
    seeded = {"prompts": prompts[:3], "sampling": {"temperature": 1, "seed": 7, "max_tokens": 12, "ignore_eos": True}}
    runs = [{"prompts": staggered, "sampling": GREEDY}, long, long, seeded, seeded]
    (result,) = run_engines(
        [{"engine": captured(smollm2), "runs": runs, "inspect": True}],
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        **ONE_PROCESS,
    )
    assert tokens(result) == [answer for answer in greedy for _ in range(2)]
    assert tokens(result, 1) == tokens(result, 2)
    assert tokens(result, 3) == tokens(result, 4)
    (counts,) = result["graphs"]
    assert counts["replays"] > 100
    assert counts["updates"] == 30 * counts["replays"]


def test_tiny_qwen3_over_two_ranks(tiny_qwen3, run_engines):
    folder, prompts, expected = tiny_qwen3
    engine = captured(folder, max_model_len=256, skip_tokenizer_init=True, tensor_parallel_size=2)
    sampling = {**GREEDY, "detokenize": False}
    (result,) = run_engines(
        [{"engine": engine, "runs": [{"prompts": prompts[:3], "sampling": sampling}], "inspect": True}],
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )
    assert tokens(result) == expected[:3]
    assert [counts["replays"] > 20 for counts in result["graphs"]] == [True, True]
