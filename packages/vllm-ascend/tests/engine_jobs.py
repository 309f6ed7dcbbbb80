# SPDX-License-Identifier: Apache-2.0
"""What jobs of `run_engines` have in common: an engine small enough for a test, greedy sampling, and the tokens of a result."""

from collections import Counter

__all__ = ["BLOCK_BYTES", "GREEDY", "ONE_PROCESS", "SMALL", "captured", "one_step", "tokens"]

GREEDY = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
SMALL = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 256 << 20,
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
BLOCK_BYTES = 128 * 2 * 3 * 64 * 4 * 30  # of SmolLM2: tokens x (key, value) x heads x head size x float32 x layers


def captured(model, **options):
    """The options of an engine that captures steps of 1, 2, 4 and 8 requests in graphs."""
    compilation = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
    return {"model": str(model), **SMALL, "enforce_eager": False, "compilation_config": compilation, **options}


def tokens(result, run=0):
    return [output["tokens"] for output in result["runs"][run]]


def one_step(result, of="calls"):
    """Calls of each operator in one decoding step of the first rank, of a job whose first two runs differ by that step; or what the host "launched"."""
    before, first, second = (Counter(counts[0]) for counts in result[of][:3])
    step = second - first - (first - before)
    assert not (first - before) - (second - first), "the second run launched less than the first"
    return step
