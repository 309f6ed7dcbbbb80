# SPDX-License-Identifier: Apache-2.0
"""Measure one system in a process of its own: python measure.py SYSTEM MODEL_FOLDER TEXTS.json -> one JSON line.

SYSTEM is `vllm` (whatever platform this interpreter's vLLM finds) or `sentence-transformers`.
"""

import json
import os
import sys
import time
from pathlib import Path

REPEATS = 5


def rate(embed, texts):
    """Best of REPEATS, in texts a second, after one warm-up."""
    embed(texts)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        embed(texts)
        best = min(best, time.perf_counter() - start)
    return len(texts) / best


def vllm(model):
    from vllm import LLM

    llm = LLM(
        model, runner="pooling", dtype="float32", enforce_eager=True, max_num_seqs=64, max_num_batched_tokens=2048,
        kv_cache_memory_bytes=64 << 20,
    )  # fmt: skip
    return lambda texts: [output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)]


def sentence_transformers(model):
    import torch
    from sentence_transformers import SentenceTransformer

    network = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": torch.float32})
    return lambda texts: network.encode(texts, batch_size=64).tolist()


def main(system, model, file):
    groups = json.loads(Path(file).read_text())
    embed = {"vllm": vllm, "sentence-transformers": sentence_transformers}[system](model)
    result = {name: rate(embed, texts) for name, texts in groups.items()}
    vectors = embed(groups["sentences"][:8])
    print("RESULT " + json.dumps({"texts_per_second": result, "vectors": vectors}), flush=True)


if __name__ == "__main__":
    os.environ["ASCEND_SIM_STRICT"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # the same for every system
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(*sys.argv[1:])
