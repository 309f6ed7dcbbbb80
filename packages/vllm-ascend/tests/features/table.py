# SPDX-License-Identifier: Apache-2.0
"""The features, and the cells of the page's matrix: one for each feature, and one for each pair of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from lora_adapters import ALL
from placed_engines import MOVING

CHUNK = 32  # tokens of a step where prompts are computed in chunks
# Everything that is a feature is off.
PLAIN = {
    "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 64 << 20, "skip_tokenizer_init": True,
    "enforce_eager": True, "enable_chunked_prefill": False, "enable_prefix_caching": False, "seed": 0,
}  # fmt: skip
# Stand for the model's folder, and for one where a KV connector keeps what it stores.
ITSELF, STORAGE = "ITSELF", "STORAGE"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One row of the page.

    Args:
        name: how it is called there.
        heading: the same in a column's heading.
        engine: what it changes in `PLAIN`.
        model: the kind of model that it needs: "experts", "int8", "int4", "pictures"; "": any.
        shown: what a run must show beside the right tokens.
    """

    name: str
    heading: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    shown: str


_ALL = [
    Feature(
        name="speculation", heading="spec",
        engine={"speculative_config": {"method": "draft_model", "model": ITSELF, "num_speculative_tokens": 3}},
        shown="drafted tokens are kept; the model drafts for itself",
    ),
    Feature(
        name="LoRA", heading="LoRA", engine={"enable_lora": True, "max_lora_rank": 16, "lora_target_modules": list(ALL[:4])},
        shown="each prompt is answered by the model and with an adapter, in one batch; the adapter's tokens are those of peft",
    ),
    Feature(
        name="chunked prefill", heading="chunks", engine={"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK},
        shown=f"three prompts are longer than a step of {CHUNK} tokens",
    ),
    Feature(
        name="prefix cache", heading="prefix", engine={"enable_prefix_caching": True}, shown="the same prompts again take blocks from the cache",
    ),
    Feature(
        name="graphs", heading="graphs",
        engine={"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}},
        shown="decoding steps are replays of graphs",
    ),
    Feature(name="TP", heading="TP", engine={"tensor_parallel_size": 2}, shown="two ranks"),
    Feature(name="PP", heading="PP", engine={"pipeline_parallel_size": 2}, shown="two stages"),
    Feature(
        name="DP", heading="DP", engine={"data_parallel_size": 2}, model="experts",
        shown="two replicas that share the experts, each with half of the prompts (vLLM starts the replicas of a dense model as engines of their own)",
    ),
    Feature(
        name="EP", heading="EP", engine={"enable_expert_parallel": True}, model="experts", shown="experts over two ranks, of TP where it is not beside DP",
    ),
    Feature(
        name="EPLB", heading="EPLB", model="experts",
        engine={"enable_expert_parallel": True, "additional_config": {"eplb_config": {**MOVING, "num_redundant_experts": 2}}},
        shown="dynamic: experts have moved, and the checksum of every slot was compared",
    ),
    Feature(
        name="W8A8", heading="W8A8", engine={"dtype": "bfloat16"}, model="int8",
        shown="ModelSlim's dynamic int8 checkpoint, in bfloat16; the reference computes its products in whole numbers",
    ),
    Feature(
        name="W4A16", heading="W4A16", model="int4",
        shown="a checkpoint of compressed-tensors with weights alone in 4 bits, in groups of 32; the reference computes with what they stand for",
    ),
    Feature(
        name="sleep", heading="sleep", engine={"enable_sleep_mode": True}, shown="the same prompts again, after a sleep of level 1",
    ),
    Feature(
        name="KV transfer", heading="KV",
        engine={"kv_transfer_config": {
            "kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"shared_storage_path": STORAGE},
        }},
        shown="the same prompts again take blocks from what vLLM's ExampleConnector has stored",
    ),
    Feature(
        name="KV offload", heading="offload", engine={"kv_offloading_size": 1 / 16},
        shown="the same prompts again, after the device's prefix cache was dropped, take blocks from host memory",
    ),
    Feature(
        name="pooling", heading="pooling", engine={"runner": "pooling", "skip_tokenizer_init": False}, shown="vectors of the last tokens instead of tokens",
    ),
    Feature(
        name="multimodal", heading="images", model="pictures",
        engine={"limit_mm_per_prompt": {"image": 3}, "skip_tokenizer_init": False, "max_model_len": 512, "max_num_batched_tokens": 1024},
        shown="four of five prompts have pictures",
    ),
]  # fmt: skip
FEATURES = {feature.name: feature for feature in _ALL}
APART = {"W8A8", "W4A16"}
"""Forms of a checkpoint, of which a model has one."""
CELLS = {name: (name,) for name in FEATURES} | {
    " x ".join(pair): pair for pair in combinations(FEATURES, 2) if set(pair) != APART
}
"""Name of each cell -> its features."""


def engine(names):
    """The arguments of a cell's engine, for vLLM's `EngineArgs` but the model's folder. A chunk of a step is shorter than with pictures."""
    merged = dict(PLAIN)
    for name in sorted(names, key=lambda name: name == "chunked prefill"):
        merged |= FEATURES[name].engine
    if merged.get("enable_expert_parallel") and "data_parallel_size" not in merged:
        merged |= {"tensor_parallel_size": 2}
    return merged


def kind_of_model(names):
    """The name of a cell's checkpoint: "dense" or what its features need."""
    needs = {FEATURES[name].model for name in names} - {""}
    return ", ".join(sorted(needs)) or "dense"


def rounds(names):
    """What is done before each time that the prompts are asked."""
    again = [[]] if {"prefix cache", "KV transfer"}.intersection(names) else []
    asleep = [[["sleep", 1], ["wake_up"]]] if "sleep" in names else []
    forgotten = [[["forget"]]] if "KV offload" in names else []
    return [[], *again, *asleep, *forgotten]


def digest(names):
    """Changes with everything that the table says about a cell."""
    said = (engine(names), kind_of_model(names), rounds(names), [FEATURES[name].shown for name in names])
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
