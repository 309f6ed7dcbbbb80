# SPDX-License-Identifier: Apache-2.0
"""Run vLLM engines that embed, classify or score, as a job describes, and write what they said. Started as a process of its own by the tests.

python run_pooling.py JOB.json RESULT.pt
"""

import gc
import json
import sys
from pathlib import Path

SMALL = {"max_model_len": 512, "max_num_seqs": 64, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 64 << 20}
"""Options of an engine."""


def pool(llm, task, prompts):
    """What the model says of each text (token ids, or words), and how many of its tokens came from the cache."""
    import torch

    texts = [text if isinstance(text, str) else {"prompt_token_ids": text} for text in prompts]
    outputs = llm.encode(texts, pooling_task=task, use_tqdm=False)
    return {
        "data": [torch.as_tensor(output.outputs.data).double().cpu() for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
    }


def score(llm, query, documents):
    """How well each document fits the query."""
    return [output.outputs.score for output in llm.score(query, documents, use_tqdm=False)]


def operators(llm):
    """Calls of each operator so far, of an engine in this process."""
    from ascend_sim import counters

    return {name: count.calls for name, count in counters.snapshot().operators.items()}


def describe_here(model):
    """Let vLLM look at the model's class in this process: otherwise it starts one for each class, which imports vLLM again."""
    from vllm.model_executor.models import ModelRegistry

    for name in json.loads((Path(model) / "config.json").read_text())["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def main(job_file, result_file):
    import torch
    from vllm import LLM

    kinds = {"pool": pool, "score": score, "operators": operators}
    results = []
    for engine in json.loads(Path(job_file).read_text()):
        describe_here(engine["engine"]["model"])
        llm = LLM(runner="pooling", enforce_eager=True, **engine["engine"])
        results.append([kinds[run.pop("kind")](llm, **run) for run in engine["runs"]])
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    torch.save(results, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
