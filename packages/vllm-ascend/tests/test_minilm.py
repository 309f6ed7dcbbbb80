# SPDX-License-Identifier: Apache-2.0
"""The real all-MiniLM-L6-v2 beside sentence-transformers: vectors, and the order in which documents are found."""

import json

import pytest
import torch
from engine_processes import wait

pytestmark = pytest.mark.slow
SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is dozing in the sun by the window.",
    "The stock market fell sharply on Tuesday.",
    "Shares lost a great deal of value this week.",
    "How do I bake a loaf of sourdough bread?",
    "Mix flour, water and salt, and let the dough rise overnight.",
    "Paris is the capital of France.",
    "The Eiffel Tower stands beside the Seine.",
    "Our train to Berlin was delayed by two hours.",
    "Flights were cancelled because of the storm.",
    "Water boils at 100 degrees Celsius at sea level.",
    "Photosynthesis turns light into chemical energy.",
    "She plays the violin in the city's orchestra.",
    "The guitarist broke a string during the concert.",
    "The server answers requests in a few milliseconds.",
    "A compiler translates source code into machine code.",
    "Yes.",
    "¿Dónde está la biblioteca?",
    "He scored the winning goal in the last minute of the match, and the crowd ran onto the pitch to carry him around the stadium.",
    "In the year 1687 Isaac Newton published the Principia, in which he set out the laws of motion and of universal gravitation, and "
    "with them explained the orbits of the planets, the tides of the sea, and the paths of comets.",
]
QUERIES = [
    "a small pet taking a nap",
    "falling share prices",
    "recipe for bread",
    "problems while travelling",
    "classical musicians",
]
DOCUMENTS = SENTENCES[:14]
LEAST = {"float32": 0.99999, "bfloat16": 0.999}  # cosine of a vector and its reference


@pytest.fixture(scope="module")
def minilm(models):
    from ascend_sim.checkpoints import minilm

    return minilm(models / "minilm")


@pytest.fixture(scope="module")
def reference(minilm):
    """The vectors that sentence-transformers makes of the sentences and queries, in float32."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu", model_kwargs={"dtype": torch.float32})
    return model.encode(SENTENCES + QUERIES, convert_to_tensor=True).double().cpu()


@pytest.fixture(scope="module")
def said(minilm, engine_servers, tmp_path_factory):
    """By dtype, float32 in relaxed mode and bfloat16 in strict mode: the operators that ran before the first request, and the engine's vectors."""

    def ask(dtype, strict):
        folder = tmp_path_factory.mktemp(dtype)
        files = [folder / name for name in ("job.json", "result.pt", "said.txt")]
        run = {"kind": "pool", "task": "embed", "prompts": SENTENCES + QUERIES}
        job = {"engine": {"model": str(minilm), "dtype": dtype}, "runs": [{"kind": "operators"}, run]}
        files[0].write_text(json.dumps([job]))
        env = {"ASCEND_SIM_STRICT": strict, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        wait([engine_servers.start("run_pooling", files[:2], files[2], env)], [files[2]])
        (before, found) = torch.load(files[1])[0]
        return before, torch.stack(found["data"])

    return {"float32": ask("float32", "0"), "bfloat16": ask("bfloat16", "1")}


@pytest.fixture(scope="module")
def vectors(said):
    return {dtype: found for dtype, (_, found) in said.items()}


def test_a_prompt_runs_before_the_first_request(said):
    for before, _ in said.values():
        assert before["npu::npu_fused_infer_attention_score"] >= 6  # layers


@pytest.mark.parametrize("dtype", LEAST)
def test_vectors_are_those_of_sentence_transformers(vectors, reference, dtype):
    cosines = torch.cosine_similarity(vectors[dtype], reference)
    print(f"{dtype}: smallest cosine {cosines.min():.7f}")
    assert cosines.min() >= LEAST[dtype]
    # and what would be caught: the nearest of the other sentences
    others = reference[: len(SENTENCES)] @ reference[: len(SENTENCES)].mT - 2 * torch.eye(len(SENTENCES))
    assert others.max() < LEAST[dtype]


@pytest.mark.parametrize("dtype", LEAST)
def test_documents_are_found_in_the_same_order(vectors, reference, dtype):
    """All that the demanded cosine decides: two vectors of length 1 and cosine c are (2 - 2c)^0.5 apart, and a score by as much from either side."""

    def scores(made):
        return made[len(SENTENCES) :] @ made[: len(DOCUMENTS)].mT

    exact, found = scores(reference), scores(vectors[dtype])
    assert exact.argmax(1).tolist() == [0, 3, 4, 9, 12]
    of_a_score = 2 * (2 - 2 * LEAST[dtype]) ** 0.5
    apart = exact[:, :, None] - exact[:, None] > 2 * of_a_score
    assert ((found[:, :, None] > found[:, None]) | ~apart).all()
    print(
        f"{dtype}: {apart.sum()} pairs of documents are apart; the whole order is the same: {(found.argsort(1) == exact.argsort(1)).all()}"
    )
    assert apart.sum() > 100
    if dtype == "float32":  # where any two scores differ by more than float32's vectors do
        assert (found.argsort(1) == exact.argsort(1)).all()
