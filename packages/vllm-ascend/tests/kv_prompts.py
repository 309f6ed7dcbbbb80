# SPDX-License-Identifier: Apache-2.0
"""Prompts of several blocks for engines whose cache holds few, so that what was computed before comes from host memory or is gone."""

import json

import torch
from engine_jobs import GREEDY, tokens

__all__ = ["CACHED", "LENGTH", "OTHERS", "PROMPTS", "SAMPLING", "SIZE", "after_eviction", "assert_loaded", "from_host", "offloading", "qwen3"]  # fmt: skip

LENGTH = 8  # of answers
VOCABULARY = 512
PROMPTS = [[(7 * i * i + 3 * k) % VOCABULARY for i in range(n)] for k, n in enumerate((300, 150, 260, 129, 40))]
OTHERS = [[(5 * i * i + 11 * k + 1) % VOCABULARY for i in range(300)] for k in range(4)]
CACHED = [256, 128, 256, 128, 0]  # of PROMPTS, in whole blocks of 128 tokens that leave one to compute
BLOCKS = 9  # one of them is vLLM's own; OTHERS take all the rest
SMALL = {
    "dtype": "float32", "max_model_len": 512, "max_num_seqs": 2, "max_num_batched_tokens": 512, "num_gpu_blocks_override": BLOCKS,
    "kv_cache_memory_bytes": 64 << 20, "skip_tokenizer_init": True, "enforce_eager": True,
}  # fmt: skip
SAMPLING = GREEDY | {"max_tokens": LENGTH, "detokenize": False}
SIZE = 1 / 16  # GiB, room for all that the prompts here have


def qwen3(folder, generate):
    """A random Qwen3 for which prompts may be long: its folder, and transformers' tokens of PROMPTS. `generate` is `hugging_face_greedy`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    with torch.inference_mode():
        return folder, generate(model, PROMPTS, LENGTH)


def offloading(**extra):
    """The connector as `--kv-transfer-config` has it, with further options of its own."""
    extra = {"cpu_bytes_to_use": int(SIZE * 2**30), **extra}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def after_eviction(folder, *, others=OTHERS, inspect=False, **engine):
    """A job: prompts, others that take their blocks, and the same prompts again."""
    runs = [{"prompts": asked, "sampling": SAMPLING} for asked in (PROMPTS, others, PROMPTS)]
    return {"engine": {"model": str(folder), **SMALL, **engine}, "runs": runs, "inspect": inspect}


def from_host(result, run):
    """Tokens of prompts that came from host memory in a run."""
    before = result["cached"][run - 1]["host"] if run else 0
    return result["cached"][run]["host"] - before


def assert_loaded(result, expected, cached=CACHED):
    """The answers of a job of `after_eviction` are right, and those to the repeated prompts were computed from what host memory had of them."""
    assert tokens(result) == expected
    assert tokens(result, 2) == expected
    assert [output["cached"] for output in result["runs"][2]] == cached, json.dumps(result["cached"])
    assert from_host(result, 2) == sum(cached)
