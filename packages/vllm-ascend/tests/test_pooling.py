# SPDX-License-Identifier: Apache-2.0
"""Models that embed, classify and score on the simulated NPU against Hugging Face transformers and sentence-transformers; `pooling_errors.py` has what is admissible."""

import json
import os

import pooling_models
import pytest
import torch
from engine_jobs import ONE_PROCESS
from engine_processes import wait
from pooling_errors import float32_bound, in_bfloat16, in_blocks, relative_errors
from pooling_models import CASES, FIRST_WORD, VOCABULARY, WINDOW, answers, build, texts
from rounding import excess
from run_pooling import SMALL

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 31, 33, 48, 63, 64, 65, 90, 100, 127, 128, 129, 200]
MANY = [1 + 511 * number // 63 for number in range(64)]  # 1 to 512 tokens, 64 texts
# One of each kind, in either precision; `nox -s pooling` runs all of them.
if os.environ.get("ASCEND_TEST_ALL"):
    IN_FLOAT32 = IN_BFLOAT16 = list(CASES)
else:
    IN_FLOAT32 = [
        "bert-mean", "xlm-roberta", "modernbert", "gte-qwen2-both-ways", "embedding-gemma", "modernbert-reranker", "qwen2-process-reward",
    ]  # fmt: skip
    IN_BFLOAT16 = ["bert-mean", "gte-qwen2-both-ways", "colbert"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a case's checkpoint, by name; made once."""
    root, made = tmp_path_factory.mktemp("pooling"), {}

    def folder(name):
        if name not in made:
            made[name] = root / name
            made[name].mkdir()
            pooling_models.save(CASES[name], made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def run_pooling(tmp_path_factory, engine_servers):
    """Run a job of `run_pooling.py`; returns its results."""

    def run(job, **env):
        folder = tmp_path_factory.mktemp("job")
        files = [folder / name for name in ("job.json", "result.pt", "said.txt")]
        files[0].write_text(json.dumps(job))
        wait([engine_servers.start("run_pooling", files[:2], files[2], env)], [files[2]])
        return torch.load(files[1])

    return run


def pool(task, prompts):
    return {"kind": "pool", "task": task, "prompts": prompts}


def engine(folder, case=None, **options):
    return {"model": str(folder), **SMALL, **(case.engine if case else {}), **options}


def assert_float32(name, found, prompts, some=None):
    """The bound is found with some of the prompts, or with all."""
    case = CASES[name]
    errors = relative_errors(found, answers(case, build(case).double(), prompts))
    bound = float32_bound(in_bfloat16(case, some or prompts)[1])
    print(f"{name}: largest error {errors.max():.1e}, bound {bound:.1e}")
    assert errors.max() <= bound, f"{name}: largest error {errors.max():.1e}, bound {bound:.1e}"


@pytest.fixture(scope="module")
def prompts():
    return texts(LENGTHS)


@pytest.fixture(scope="module")
def float32(checkpoint, run_pooling, prompts):
    """What the engines of one process say, by the name of the case: of the prompts, and of many texts at once."""
    both = [prompts, texts(MANY, seed=1)]
    job = [
        {
            "engine": engine(checkpoint(name), CASES[name], dtype="float32"),
            "runs": [pool(CASES[name].task, texts) for texts in (both if name in ("bert-mean", "modernbert") else both[:1])],
        }
        for name in IN_FLOAT32
    ]  # fmt: skip
    return dict(zip(IN_FLOAT32, run_pooling(job, **ONE_PROCESS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_float32(name, float32, prompts):
    assert_float32(name, float32[name][0]["data"], prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-mean", "modernbert"])
def test_sixty_four_texts_of_one_to_512_tokens_at_once(name, float32):
    many = texts(MANY, seed=1)
    assert (len(many), min(map(len, many)), max(map(len, many))) == (64, 1, 512)
    assert_float32(name, float32[name][1]["data"], many, many[:48:8])


@pytest.fixture(scope="module")
def bfloat16(checkpoint, run_pooling, prompts):
    job = [
        {"engine": engine(checkpoint(name), CASES[name], dtype="bfloat16"), "runs": [pool(CASES[name].task, prompts)]}
        for name in IN_BFLOAT16
    ]
    return dict(zip(IN_BFLOAT16, run_pooling(job, ASCEND_SIM_STRICT="1", **ONE_PROCESS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16_in_strict_mode(name, bfloat16, prompts):
    case = CASES[name]
    exact, reference = in_bfloat16(case, prompts)
    errors = relative_errors(bfloat16[name][0]["data"], exact)
    found = excess(errors, reference, in_blocks(case))
    assert found <= 1, f"{name}: mean error {errors.mean():.4f}, of the reference {reference.mean():.4f}: {found:.2f}"


def shift_positions(model):
    """By one: RoBERTa counts from the padding token's id on."""
    weight = model.embeddings.position_embeddings.weight
    weight.data = weight.data.roll(1, 0)


def narrow_window(model):
    """By one key on either side."""
    model.config.sliding_window -= 1
    for layer in model.layers:
        if layer.attn.sliding_window is not None:
            layer.attn.sliding_window -= 1


def one_sided(model):
    """As a decoder."""
    forward = model.forward
    model.forward = lambda ids, attention_mask=None: forward(ids)


def scale_attention(model):
    """As if heads of 32 that are filled up to 64 were scaled by the latter."""
    for layer in model.encoder.layer:
        layer.attention.self.scaling *= 2**-0.5


SPOILT = {
    "xlm-roberta": shift_positions,
    "modernbert": narrow_window,
    "gte-qwen2-both-ways": one_sided,
    "bert-mean": scale_attention,
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_bounds_catch_a_wrong_model(name, prompts):
    """transformers' own model, spoilt, in either precision."""
    case = CASES[name]
    model = build(case)
    exact = answers(case, model.double(), prompts)
    SPOILT[name](model.float())
    exact_of_bfloat16, reference = in_bfloat16(case, prompts)
    assert relative_errors(answers(case, model, prompts), exact).max() > float32_bound(reference)
    errors = relative_errors(answers(case, model.bfloat16(), prompts), exact_of_bfloat16)
    assert excess(errors, reference, in_blocks(case)) > 1


@pytest.mark.slow
@pytest.mark.long
def test_prefix_cache_and_chunks_of_causal_embedders(checkpoint, run_pooling):
    """The vectors of a second round, from the prefix cache, and of prompts in chunks of 48 tokens are those of transformers as well."""
    long = texts([20, 130, 200, 257, 300, 400], seed=2)
    extended = [ids[:128] + more for ids, more in zip(long, texts([10] * 6, seed=3), strict=True)]
    cases = ["qwen3-embedding", "qwen3-classifier"]
    job = [
        {
            "engine": engine(
                checkpoint(name), CASES[name], dtype="float32", max_num_seqs=8, max_num_batched_tokens=48,
                enable_prefix_caching=True, enable_chunked_prefill=True
            ),
            "runs": [pool(CASES[name].task, each) for each in (long, long, extended)],
        }
        for name in cases
    ]  # fmt: skip
    for name, (first, second, other) in zip(cases, run_pooling(job, **ONE_PROCESS), strict=True):
        assert first["cached"] == [0] * 6
        assert second["cached"] == [0, 128, 128, 256, 256, 384]
        assert other["cached"] == [0, 128, 128, 128, 128, 128]
        for found, prompts in ((first, long), (second, long), (other, extended)):
            assert_float32(name, found["data"], prompts)


@pytest.mark.slow
def test_over_two_ranks(checkpoint, run_pooling, prompts):
    cases = ["bert-cls", "qwen2-process-reward"]  # vLLM splits ModernBERT's q, k and v as one rank has them
    job = [
        {"engine": engine(checkpoint(name), CASES[name], dtype="float32", tensor_parallel_size=2), "runs": [pool(CASES[name].task, prompts)]}
        for name in cases
    ]  # fmt: skip
    for name, (found,) in zip(cases, run_pooling(job), strict=True):
        assert_float32(name, found["data"], prompts)


def words(ids):
    return " ".join(f"w{number}" for number in ids)


@pytest.mark.slow
def test_scores_of_pairs(checkpoint, run_pooling):
    """A cross-encoder reads query and document together, and knows by their types which is which; ColBERT compares their tokens' vectors."""
    from transformers import AutoTokenizer

    query, *documents = (
        [FIRST_WORD + 1 + number % (VOCABULARY - FIRST_WORD - 1) for number in ids]
        for ids in texts([9, 1, 5, 30, 200], seed=4)
    )
    query, documents = words(query), [words(ids) for ids in documents]
    cases = ["bert-cross-encoder", "colbert"]
    run = {"kind": "score", "query": query, "documents": documents}
    job = [{"engine": engine(checkpoint(name), dtype="float32"), "runs": [dict(run)]} for name in cases]
    (crossed,), (compared,) = run_pooling(job, **ONE_PROCESS)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(cases[0]))

    def cross(model):
        with torch.inference_mode():
            pairs = [tokenizer(query, document, return_tensors="pt") for document in documents]
            return torch.stack([model(**pair).logits[0, 0].sigmoid() for pair in pairs]).double()

    def compare(model):
        case = CASES["colbert"]
        vectors = answers(case, model, [tokenizer(text)["input_ids"] for text in (query, *documents)])
        return torch.stack([(vectors[0] @ vector.mT).amax(1).sum() for vector in vectors[1:]])

    for name, found, reference in zip(cases, (crossed, compared), (cross, compare), strict=True):
        exact, rounded = reference(build(CASES[name]).double()), reference(build(CASES[name]).bfloat16())
        errors = (torch.tensor(found).double() - exact).abs()
        assert errors.max() <= float32_bound((rounded - exact).abs()), (found, exact)
    with torch.inference_mode():  # and the types do matter
        one = torch.stack(
            [
                build(CASES[cases[0]])(torch.tensor([tokenizer(query, text)["input_ids"]])).logits[0, 0].sigmoid()
                for text in documents
            ]
        )
    assert (one - torch.tensor(crossed)).abs().max() > 1e-3


def test_windows_reach_both_ways():
    """What the cases are made of: the models of windows have layers with one and layers without."""
    kinds = build(CASES["modernbert"]).config.layer_types
    assert {"sliding_attention", "full_attention"} <= set(kinds)
    assert build(CASES["modernbert"]).config.sliding_window == WINDOW
