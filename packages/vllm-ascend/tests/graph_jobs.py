# SPDX-License-Identifier: Apache-2.0
"""Engines whose decoding steps are captured in graphs, beside those that run operator by operator."""

__all__ = ["GREEDY", "ONE_PROCESS", "SMALL", "captured", "tokens"]

GREEDY = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
SMALL = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 256 << 20,
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def captured(model, **options):
    """The options of an engine that captures steps of 1, 2, 4 and 8 requests."""
    compilation = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
    return {"model": str(model), **SMALL, "enforce_eager": False, "compilation_config": compilation, **options}


def tokens(result, run=0):
    return [output["tokens"] for output in result["runs"][run]]
