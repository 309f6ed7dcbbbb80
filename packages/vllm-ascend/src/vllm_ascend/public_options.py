# SPDX-License-Identifier: Apache-2.0
"""Options of the public plugin that this one does not have, and those that have no effect here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["INERT", "KNOWN", "OF_VLLM", "REMEDIES", "changes_nothing"]

# Path -> the values under which the option changes nothing, so that they are accepted. null always is, and where {} is one, an object whose "enabled" is false.
KNOWN: Mapping[str, tuple[Any, ...]] = {
    "enable_dsa_cp": (False,),  # context parallelism of DeepSeek sparse attention, which has no attention backend here
    "enable_sparse_sfa_c8": (False,),  # int8 caches of sparse attention, and of its indexer
    "enable_sparse_li_c8": (False,),
    "c8_enable_reshape_optim": (False, True),  # concerns int8 caches alone
    "multistream_overlap_shared_expert": (False,),
    "multistream_overlap_gate": (False,),
    "multistream_dsv4_dsa_overlap": (False,),
    "num_iterations_eplb_update": (),  # older names of the two intervals
    "num_wait_worker_iterations": (),
    "enable_fused_mc2": (0, False),
    "enable_prefill_mc2": (False,),
    "enable_mc2_hierarchy_comm": (False,),
    "mega_moe_max_tokens": (65536,),
    "enable_mlapo": (True, False),  # one kernel for what comes before latent attention; here it is several
    "enable_kv_nz": (False,),
    "pa_shape_list": ([],),
    "enable_transpose_kv_cache_by_block": (True, False),  # concerns KV transfer alone
    "ascend_compilation_config": ({},),
    "torchair_graph_config": ({},),
    "xlite_graph_config": ({},),
    "rejection_sampler_config": ({},),
    "profiling_chunk_config": ({},),
    "ascend_scheduler_config": ({},),
    "scheduler_config": ({},),
    "dynamic_spec_config": ({},),
    "rl_config": ({},),
    "recompute_scheduler_enable": (False,),
    "enable_balance_scheduling": (False,),
    "SLO_limits_for_dynamic_batch": (-1,),
    "enable_sleep_mode_extra_cleanup": (False,),
    "enable_async_exponential": (0, False),
    "enable_reduce_sample": (False,),
    "msmonitor_use_daemon": (0, False),
    "dump_config": ({},),
    "dump_config_path": (),
}
# What to do instead, where it is more than to leave the option out.
REMEDIES: Mapping[str, str] = {
    "torchair_graph_config": "older versions of the public plugin had it, and nothing is captured as a graph here; remove it",
    "ascend_scheduler_config": (
        "older versions of the public plugin had it; remove it, and give vLLM's own options of the scheduler "
        "(--max-num-batched-tokens, --enable-chunked-prefill, --scheduling-policy)"
    ),
    "num_iterations_eplb_update": "it is now eplb_config.expert_heat_collection_interval",
    "num_wait_worker_iterations": "it is now eplb_config.algorithm_execution_interval, which belongs to eplb_config.dynamic_eplb",
    "rejection_sampler_config": "rejection sampling has no options here; remove it",
    "dynamic_spec_config": "the number of drafted tokens is num_speculative_tokens of --speculative-config; remove it",
}
# Accepted and without effect: there is no configuration kept from an earlier engine to refresh, and no thread to bind to a core.
INERT = ("refresh", "enable_cpu_binding")
# Keys that vLLM itself puts into additional_config.
OF_VLLM = ("gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend")


def changes_nothing(path: str, value: object) -> bool:
    """Whether the known option at `path` changes nothing when it has this `value`."""
    neutral = KNOWN[path]
    if {} in neutral and isinstance(value, Mapping) and value.get("enabled") is False:
        return True
    return value is None or value in neutral
