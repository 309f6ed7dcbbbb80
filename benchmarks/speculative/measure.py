# SPDX-License-Identifier: Apache-2.0
"""Measure one way of drafting in a process of its own: python measure.py MODEL_FOLDER SPECULATIVE_CONFIG -> one JSON line.

SPECULATIVE_CONFIG is JSON as of vLLM's `--speculative-config`, or `null`. The platform is whatever this interpreter's vLLM finds.
"""

import json
import os
import sys
import time

TOKENS = 64
REPEATS = 2
BATCHES = (1, 8)
QUESTIONS = [
    "Count from 1 to 40: 1, 2, 3, 4, 5, 6,",
    "Write the line 'The cat sat on the mat.' ten times.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is the capital of France?",
    "Tell me a short story about a fox.",
    "Name three colours, and one sentence about each.",
    "How many days are in a week? List them.",
]


def launches():
    """What the simulated NPU was given to do so far; None on another platform."""
    try:
        from ascend_sim import counters
    except ImportError:
        return None
    return counters.snapshot().launches


def accepted(llm):
    """Drafted tokens so far, and those of them that were kept."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return [int(values.get(f"vllm:spec_decode_num_{name}_tokens", 0)) for name in ("draft", "accepted")]


def measure(model, draft):
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512,
        kv_cache_memory_bytes=512 << 20, enable_prefix_caching=False, disable_log_stats=False, speculative_config=draft,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    result = {}
    for batch in BATCHES:
        llm.chat(chats[:batch], sampling, use_tqdm=False)
        best, before, counted = float("inf"), launches(), accepted(llm)
        for _ in range(REPEATS):
            start = time.perf_counter()
            llm.chat(chats[:batch], sampling, use_tqdm=False)
            best = min(best, time.perf_counter() - start)
        after = launches()
        drafted, kept = (now - then for now, then in zip(accepted(llm), counted, strict=True))
        result[str(batch)] = {
            "tokens_per_second": batch * TOKENS / best,
            "launches_per_token": None if before is None else (after - before) / (REPEATS * batch * TOKENS),
            "kept": kept / drafted if drafted else None,
        }
    llm.llm_engine.engine_core.shutdown()
    return result


if __name__ == "__main__":
    os.environ["ASCEND_SIM_STRICT"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # the same for every platform
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    print("RESULT " + json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
