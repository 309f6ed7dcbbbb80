# SPDX-License-Identifier: Apache-2.0
"""`nox -s speculation`: greedy tokens of every method of speculative decoding against Hugging Face transformers, over more arrangements than the default tests have."""

import pytest
from engine_jobs import GREEDY, ONE_PROCESS, SMALL, tokens
from moe_families import models_of_each_family
from speculative_models import PROMPTS, llama_with_drafts, with_next_token_layer

LENGTH = 24
SAMPLING = GREEDY | {"max_tokens": LENGTH, "detokenize": False}
TINY = SMALL | {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 64 << 20, "skip_tokenizer_init": True}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def job(folder, draft, **engine):
    """A run of `PROMPTS`, which are longer than a step, for fewer places than there are requests."""
    engine = {"model": str(folder), **TINY, **engine, "speculative_config": draft}
    return {"engine": engine, "runs": [{"prompts": PROMPTS, "sampling": SAMPLING}]}


def kept(result):
    """How many drafts were kept at each of their places."""
    return result["speculation"]["accepted_tokens_per_pos"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory, hugging_face):
    """A random Llama: its folder, Hugging Face's tokens, and the folders of drafts by method."""
    return llama_with_drafts(tmp_path_factory.mktemp("llama"), hugging_face, LENGTH)


@pytest.fixture(scope="module")
def next_token_models(tmp_path_factory, hugging_face):
    """Name -> the folder of a random model with a layer for multi-token prediction, and Hugging Face's tokens."""
    root = tmp_path_factory.mktemp("mtp")
    made = {}
    for name, model in models_of_each_family():
        if name != "deepseek_v2":
            made[name] = with_next_token_layer(root, name, type(model), model.config, hugging_face, PROMPTS, LENGTH)
    return made


def test_drafts_of_models(llama, run_engines):
    """What EAGLE drafts is the same whether its first pass has rejected tokens as padding, asynchronously scheduled, or none, synchronously: two ways to its inputs and its
    lengths. So is the first token that is drafted, where it is the only one."""
    folder, expected, drafts = llama
    jobs = {}
    for method in ("eagle", "eagle3"):
        draft = {"method": method, "model": str(drafts[method]), "num_speculative_tokens": 3}
        jobs[method] = job(folder, draft)
        jobs[f"{method}, synchronous"] = job(folder, draft, async_scheduling=False)
        jobs[f"{method}, unpadded"] = job(folder, draft | {"disable_padded_drafter_batch": True})
        jobs[f"{method}, one token"] = job(folder, draft | {"num_speculative_tokens": 1})
    medusa = {"method": "medusa", "model": str(drafts["medusa"]), "num_speculative_tokens": 3}
    jobs["medusa"] = job(folder, medusa)
    results = dict(zip(jobs, run_engines(list(jobs.values()), **ONE_PROCESS), strict=True))
    for name, result in results.items():
        assert tokens(result) == expected, name
        assert result["speculation"]["accepted_tokens"] > 0, name
    for method in ("eagle", "eagle3"):
        assert kept(results[method]) == kept(results[f"{method}, synchronous"]) == kept(results[f"{method}, unpadded"])


def test_multi_token_prediction(next_token_models, run_engines):
    """Latent attention and grouped heads, with three tokens of one layer, two ways as for EAGLE."""
    draft = {"method": "mtp", "num_speculative_tokens": 3}
    for name, (folder, expected) in next_token_models.items():
        padded, unpadded = run_engines(
            [job(folder, draft), job(folder, draft | {"disable_padded_drafter_batch": True})], **ONE_PROCESS
        )
        assert tokens(padded) == tokens(unpadded) == expected, name
        assert kept(padded) == kept(unpadded), name
        assert padded["speculation"]["accepted_tokens"] > 0, name
