# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with an embedding model and with a cross-encoder: vLLM's API for such models, and what it says to bad input."""

from concurrent.futures import ThreadPoolExecutor

import pooling_models
import pytest
import torch
from served import Server, running

pytestmark = pytest.mark.slow


OPTIONS = ("--dtype", "bfloat16", "--max-num-seqs", "64")


@pytest.fixture(scope="module")
def servers(models, tmp_path_factory):
    """The embedder, all-MiniLM-L6-v2, and the cross-encoder, a small random BERT; they start side by side."""
    from ascend_sim.checkpoints import minilm

    folder = tmp_path_factory.mktemp("served")
    checkpoint = folder / "cross-encoder"
    checkpoint.mkdir()
    pooling_models.save(pooling_models.CASES["bert-cross-encoder"], checkpoint)
    started = {
        "embedder": Server(minilm(models / "minilm"), folder / "embedder.txt", *OPTIONS),
        "cross-encoder": Server(checkpoint, folder / "cross-encoder.txt", *OPTIONS),
    }
    with running(started, "Traceback"):
        yield started


@pytest.fixture
def embedder(servers):
    return servers["embedder"]


@pytest.fixture
def cross_encoder(servers):
    return servers["cross-encoder"]


def embed(server, texts):
    answer = server.openai.embeddings.create(model="model", input=texts)
    assert [entry.index for entry in answer.data] == list(range(len(texts)))
    return torch.tensor([entry.embedding for entry in answer.data])


def test_embeddings(embedder):
    vectors = embed(embedder, ["A cat sleeps.", "A kitten is dozing.", "Shares fell on Tuesday."])
    assert vectors.shape == (3, 384)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > far + 0.3
    pooled = embedder.post("/pooling", input="A cat sleeps.").json()["data"][0]["data"]
    assert torch.cosine_similarity(torch.tensor(pooled), vectors[0], dim=0) > 0.999


def test_sixty_four_requests_at_once(embedder):
    texts = [" ".join(["word"] * number + [str(number)]) for number in range(1, 65)]
    with ThreadPoolExecutor(64) as pool:
        vectors = torch.cat(list(pool.map(lambda text: embed(embedder, [text]), texts)))
    assert torch.cosine_similarity(vectors, embed(embedder, texts)).min() > 0.999


def test_scores_of_an_embedder_are_cosines(embedder):
    vectors = embed(embedder, ["a cat", "a kitten", "the moon"])
    answer = embedder.post("/score", text_1="a cat", text_2=["a kitten", "the moon"]).json()
    found = torch.tensor([entry["score"] for entry in answer["data"]])
    assert (found - vectors[1:] @ vectors[0]).abs().max() < 0.01
    ranked = embedder.post("/rerank", query="a cat", documents=["the moon", "a kitten"]).json()["results"]
    assert [entry["document"]["text"] for entry in ranked] == ["a kitten", "the moon"]


def test_scores_of_a_cross_encoder(cross_encoder):
    from transformers import AutoTokenizer

    query, documents = "w9 w10 w11", ["w12 w13", "w9", "w400 w401 w402 w403 w404"]
    scores = [entry["score"] for entry in cross_encoder.post("/score", text_1=query, text_2=documents).json()["data"]]
    model = pooling_models.build(pooling_models.CASES["bert-cross-encoder"])
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder.log.parent / "cross-encoder")
    with torch.inference_mode():
        pairs = [tokenizer(query, document, return_tensors="pt") for document in documents]
        expected = [model(**pair).logits[0, 0].sigmoid().item() for pair in pairs]
    assert scores == pytest.approx(expected, abs=0.05)
    assert max(expected) - min(expected) > 0.1
    order = sorted(range(3), key=lambda number: -scores[number])
    results = cross_encoder.post("/rerank", query=query, documents=documents, top_n=2).json()["results"]
    assert [entry["index"] for entry in results] == order[:2]


def test_classes(cross_encoder):
    (entry,) = cross_encoder.post("/classify", input="w9 w10").json()["data"]
    assert entry["num_classes"] == 1
    assert 0 <= entry["probs"][0] <= 1
    pooled = cross_encoder.post("/pooling", input="w9 w10", task="classify").json()["data"][0]["data"]
    assert pooled == pytest.approx(entry["probs"], abs=1e-6)


LONG = "word " * 600
WRONG = {
    "nothing": ("embedder", "/v1/embeddings", {}, 400, "input"),
    "no texts": ("embedder", "/v1/embeddings", {"input": []}, 400, "at least one prompt"),
    "no tokens": ("embedder", "/v1/embeddings", {"input": [[]]}, 400, "cannot be empty"),
    "a number": ("embedder", "/v1/embeddings", {"input": 5}, 400, "Input should be a valid"),
    "an object": ("embedder", "/v1/embeddings", {"input": {"text": "a"}}, 400, "Input should be a valid"),
    "a mixture": ("embedder", "/v1/embeddings", {"input": [1, "x"]}, 400, "Input should be a valid"),
    "null": ("embedder", "/v1/embeddings", {"input": None}, 400, "Input should be a valid"),
    "a token beyond the vocabulary": ("embedder", "/v1/embeddings", {"input": [1000000]}, 400, "Token id 1000000 is out of vocabulary"),
    "a negative token": ("embedder", "/v1/embeddings", {"input": [-1]}, 400, "Token id -1 is out of vocabulary"),
    "a long text": ("embedder", "/v1/embeddings", {"input": LONG}, 400, "maximum context length is 256 tokens"),
    "one long text of two": ("embedder", "/v1/embeddings", {"input": ["short", LONG]}, 400, "maximum context length is 256 tokens"),
    "dimensions": ("embedder", "/v1/embeddings", {"input": "a", "dimensions": 7}, 400, "does not support Matryoshka embeddings"),
    "an encoding": ("embedder", "/v1/embeddings", {"input": "a", "encoding_format": "base32"}, 400, "Input should be 'float', 'base64'"),
    "another model": ("embedder", "/v1/embeddings", {"input": "a", "model": "other"}, 404, "`other` does not exist"),
    "another task": ("embedder", "/pooling", {"input": "a", "task": "classify"}, 400, "Unsupported task: 'classify'"),
    "classes of an embedder": ("embedder", "/classify", {"input": "a"}, 404, "Not Found"),
    "an answer of an embedder": ("embedder", "/v1/completions", {"prompt": "a"}, 404, "Not Found"),
    "vectors of a cross-encoder": ("cross-encoder", "/v1/embeddings", {"input": "w9"}, 404, "Not Found"),
    "no second text": ("cross-encoder", "/score", {"text_1": "w9"}, 400, ""),
    "a number of texts": ("cross-encoder", "/score", {"text_1": "w9", "text_2": 5}, 400, ""),
    "a long query": ("cross-encoder", "/score", {"text_1": "w9 " * 600, "text_2": ["w9"]}, 400, ""),
    "no text to classify": ("cross-encoder", "/classify", {"input": []}, 400, "at least one prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_answered_and_the_server_lives(servers, name):
    server, path, body, status, message = WRONG[name]
    answer = servers[server].post(path, **body)
    assert (answer.status_code, message in answer.text) == (status, True), answer.text
    assert servers[server].is_alive()


def test_an_empty_text_is_its_special_tokens(embedder):
    """As in sentence-transformers."""
    (vector,) = embed(embedder, [""])
    tokens = torch.tensor(embedder.openai.embeddings.create(model="model", input=[101, 102]).data[0].embedding)
    assert torch.cosine_similarity(vector, tokens, dim=0) > 0.999
