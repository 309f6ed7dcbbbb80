# SPDX-License-Identifier: Apache-2.0
"""Tokens with speculative decoding against Hugging Face transformers; `nox -s speculation` has more methods and arrangements of ranks (speculative_engines.py)."""

import pytest
from engine_jobs import GREEDY, ONE_PROCESS, SMALL, tokens
from speculative_models import first_layers

pytestmark = pytest.mark.slow


def test_one_process(smollm2, prompts, greedy, tiny_qwen3, tmp_path, run_engines):
    """N-grams; the first layers of the model as its draft, asynchronously scheduled; and a model that drafts for itself, whose every token is kept, with prompts in
    chunks, prefixes from the cache, requests that wait for a place, and seeds."""
    layers = first_layers(smollm2, tmp_path / "draft", 20)
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    draft = {"method": "draft_model", "model": str(layers), "num_speculative_tokens": 3}
    run = {"prompts": prompts[:4], "sampling": GREEDY}
    jobs = [
        {"engine": {"model": str(smollm2), **SMALL, "speculative_config": one}, "runs": [run]} for one in (ngram, draft)
    ]
    folder, short, expected = tiny_qwen3
    own = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 4}
    small = {"max_model_len": 256, "max_num_batched_tokens": 40, "max_num_seqs": 4, "skip_tokenizer_init": True}
    sampling = GREEDY | {"detokenize": False}
    seeded = sampling | {"temperature": 1, "seed": 7, "max_tokens": 12}
    runs = [{"prompts": short, "sampling": one} for one in (sampling, sampling)]
    runs += [{"prompts": short[:3], "sampling": seeded} for _ in range(2)]
    jobs.append({"engine": {"model": str(folder), **SMALL, **small, "speculative_config": own}, "runs": runs})
    ngram, draft, own = run_engines(jobs, **ONE_PROCESS)
    assert tokens(ngram) == greedy[:4]
    assert tokens(draft) == greedy[:4]
    assert tokens(own) == tokens(own, 1) == expected
    assert tokens(own, 2) == tokens(own, 3) != [answer[:12] for answer in expected[:3]]
    for result in (ngram, draft):
        assert 0 < result["speculation"][0]["accepted_tokens"] < result["speculation"][0]["draft_tokens"]
    greedily = own["speculation"][1]
    assert greedily["accepted_tokens"] == greedily["draft_tokens"] > 0
