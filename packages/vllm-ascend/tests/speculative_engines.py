# SPDX-License-Identifier: Apache-2.0
"""`nox -s speculation`: greedy tokens of every method of speculative decoding against Hugging Face transformers, over more arrangements than the default tests have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine_jobs import GREEDY, ONE_PROCESS, SMALL, tokens
from features import models
from moe_families import models_of_each_family
from speculative_models import PROMPTS, llama_with_drafts, with_next_token_layer

LENGTH = 24
SAMPLING = GREEDY | {"max_tokens": LENGTH, "detokenize": False}
TINY = SMALL | {"max_model_len": 256, "max_num_seqs": 4, "kv_cache_memory_bytes": 64 << 20, "skip_tokenizer_init": True}  # fmt: skip
INSPECTED = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
ALONE = ONE_PROCESS | INSPECTED
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def job(folder, draft, **engine):
    """A run of `PROMPTS`, for fewer places than there are requests; of those in `share`."""
    share = engine.pop("share", slice(None))
    engine = {"model": str(folder), **TINY, **engine, "speculative_config": draft}
    return {"engine": engine, "runs": [{"prompts": PROMPTS[share], "sampling": SAMPLING}], "inspect": True}


def kept(result):
    """How many drafts were kept at each of their places."""
    return result["speculation"][0]["accepted_tokens_per_pos"]


def replays(result):
    """Captured steps of the run, which are one number for all ranks; the counts of a process go on over its engines."""
    before, after = result["launched"]
    (found,) = {end["replays"] - begin["replays"] for begin, end in zip(before, after, strict=True)}
    return found


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
        jobs[f"{method}, operator by operator"] = job(folder, draft, enforce_eager=True)
    medusa = {"method": "medusa", "model": str(drafts["medusa"]), "num_speculative_tokens": 3}
    jobs["medusa"] = job(folder, medusa)
    results = dict(zip(jobs, run_engines(list(jobs.values()), **ALONE), strict=True))
    for name, result in results.items():
        assert tokens(result) == expected, name
        assert sum(kept(result)) > 0, name
        assert (replays(result) > 0) == ("operator by operator" not in name), name
    for method in ("eagle", "eagle3"):
        assert kept(results[method]) == kept(results[f"{method}, synchronous"]) == kept(results[f"{method}, unpadded"])
        assert kept(results[method]) == kept(results[f"{method}, operator by operator"])


def test_multi_token_prediction(next_token_models, run_engines):
    """Latent attention and grouped heads, with three tokens of one layer, two ways as for EAGLE, and in graphs as operator by operator; and n-grams."""
    draft = {"method": "mtp", "num_speculative_tokens": 3}
    for name, (folder, expected) in next_token_models.items():
        jobs = [
            job(folder, draft),
            job(folder, draft | {"disable_padded_drafter_batch": True}),
            job(folder, draft, enforce_eager=True),
            job(folder, NGRAM),
        ]
        padded, unpadded, eager, ngram = run_engines(jobs, **ALONE)
        assert tokens(padded) == tokens(unpadded) == tokens(eager) == tokens(ngram) == expected, name
        assert kept(padded) == kept(unpadded) == kept(eager), name
        assert sum(kept(padded)) > 0, name
        assert replays(padded) > 10, name
        assert replays(eager) == 0


def test_drafts_of_the_text(llama, run_engines):
    """The suffix tree needs the package arctic-inference."""
    pytest.importorskip("arctic_inference")
    folder, expected, _ = llama
    drafts = [{"method": "suffix", "num_speculative_tokens": 4}, NGRAM]
    for result in run_engines([job(folder, draft, max_num_batched_tokens=64) for draft in drafts], **ALONE):
        assert tokens(result) == expected
        assert sum(kept(result)) > 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_models(kind, tmp_path, run_engines):
    """Drafts of a float model or of the model itself, and n-grams, on prompts to which rounding makes no difference."""
    make = "import sys; from features import models; models.main(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", make, kind, str(tmp_path)], cwd=Path(__file__).parent, check=True)
    reference = json.loads((tmp_path / "reference.json").read_text())
    prompts = [request["ids"] for request in reference["requests"]]
    run = {"prompts": prompts, "sampling": SAMPLING | {"max_tokens": models.TOKENS}}
    draft = {
        "method": "draft_model",
        "model": str(tmp_path / "float" if kind == "int8" else tmp_path),
        "num_speculative_tokens": 3,
    }
    dtype = "bfloat16" if kind == "int8" else "float32"
    engine = TINY | {"model": str(models.checkpoint(kind, tmp_path)), "dtype": dtype, "max_num_batched_tokens": 512}
    for ranks in (1, 2):
        jobs = [
            {
                "engine": engine | {"speculative_config": how, "tensor_parallel_size": ranks},
                "runs": [run],
                "inspect": True,
            }
            for how in (draft, NGRAM)
        ]
        by_model, by_text = run_engines(jobs, **ALONE)
        assert tokens(by_model) == tokens(by_text) == reference["tokens"]
        assert sum(kept(by_model)) > 0


def test_two_ranks(llama, next_token_models, run_engines):
    """Tensor parallel; both sides decide the same. What is kept is what one rank keeps."""
    folder, expected, drafts = llama
    models = {"eagle": (folder, {"method": "eagle", "model": str(drafts["eagle"])}, expected)}
    models["draft model"] = (folder, {"method": "draft_model", "model": str(folder)}, expected)
    models |= {name: (where, {"method": "mtp"}, answers) for name, (where, answers) in next_token_models.items()}
    for name, (where, draft, answers) in models.items():
        draft = draft | {"num_speculative_tokens": 3}
        (alone,) = run_engines([job(where, draft)], **ALONE)
        (result,) = run_engines([job(where, draft, tensor_parallel_size=2)], **ALONE)
        assert tokens(result) == tokens(alone) == answers, name
        assert kept(result) == kept(alone), name
        assert replays(result) == replays(alone) > 0, name


@pytest.mark.parametrize("method", ["mtp", "ngram", "draft_model"])
def test_replicas(method, next_token_models, run_replicas):
    """Two replicas that share experts, with different work: the one that is done first drafts for nobody beside the other."""
    shares = [slice(0, 2), slice(2, None)]
    for name, (folder, expected) in next_token_models.items():
        draft = NGRAM if method == "ngram" else {"method": method, "num_speculative_tokens": 3}
        if method == "draft_model":
            draft["model"] = str(folder)  # itself
        jobs = [[job(folder, draft, enable_expert_parallel=True, share=share)] for share in shares]
        for share, (result,) in zip(shares, run_replicas(jobs, **INSPECTED), strict=True):
            assert tokens(result) == expected[share], name
            assert replays(result) > 0, name
