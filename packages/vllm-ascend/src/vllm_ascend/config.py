# SPDX-License-Identifier: Apache-2.0
"""AscendConfig: this plugin's options, given as `--additional-config '{...}'`, under the names that the public plugin uses."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AscendConfig"]

# Options of the public plugin that this version does not have: name -> the values that ask for nothing.
KNOWN: Mapping[str, tuple[Any, ...]] = {
    "enable_flashcomm1": (False,),
    "flashcomm2_parallel_size": (0,),
    "enable_matmul_allreduce": (False,),
    "layer_sharding": (None, []),
    "enable_dsa_cp": (False,),
    "enable_shared_expert_dp": (False,),
    "multistream_overlap_shared_expert": (False,),
    "multistream_overlap_gate": (False,),
    "finegrained_tp_config": (None, {}),
    "weight_prefetch_config": (None, {}, {"enabled": False}),
    "eplb_config": (None, {}, {"dynamic_eplb": False}),
    "enable_fused_mc2": (0, False),
    "enable_prefill_mc2": (False,),
    "enable_mc2_hierarchy_comm": (False,),
    "mega_moe_max_tokens": (65536,),
    "weight_nz_mode": (0, 1),  # 1 concerns quantised weights, which this version does not load
    "enable_mlapo": (True, False),  # concerns multi-head latent attention alone
    "enable_kv_nz": (False,),
    "pa_shape_list": (None, []),
    "enable_transpose_kv_cache_by_block": (True, False),  # concerns KV transfer alone
    "ascend_compilation_config": (None, {}),
    "xlite_graph_config": (None, {}, {"enabled": False}),
    "rejection_sampler_config": (None, {}),
    "profiling_chunk_config": (None, {}, {"enabled": False}),
    "recompute_scheduler_enable": (False,),
    "enable_balance_scheduling": (False,),
    "SLO_limits_for_dynamic_batch": (-1, None),
    "enable_sleep_mode_extra_cleanup": (False,),
    "enable_async_exponential": (0, False),
    "enable_reduce_sample": (False,),
    "msmonitor_use_daemon": (0, False),
    "dump_config": (None, {}),
    "dump_config_path": (None,),
}
# Accepted and without effect: there is no configuration kept from an earlier engine to refresh, and no thread to bind to a core.
INERT = ("refresh", "enable_cpu_binding")
# Keys that vLLM itself puts into additional_config.
OF_VLLM = ("gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend")


@dataclass(frozen=True, slots=True, kw_only=True)
class AscendConfig:
    """This plugin's options, checked. None is implemented yet: linear and MoE options follow with their packages."""

    @classmethod
    def of(cls, additional_config: object, retired_variables: Mapping[str, str] | None = None) -> AscendConfig:
        """Check what the user gave.

        Args:
            additional_config: vLLM's `additional_config`.
            retired_variables: variables of the public plugin that are set, with the key that took their place ("" for none).

        Raises:
            ValueError: naming the option, its value and the remedy, for an unknown key, a known one that this plugin does not have, and a
                variable that the public plugin read.
        """
        for name, key in (retired_variables or {}).items():
            remedy = f"use --additional-config '{{\"{key}\": ...}}'" if key else "unset it"
            raise ValueError(f"environment variable {name} belongs to the public plugin and is not read here; {remedy}")
        if not isinstance(additional_config, Mapping):
            raise ValueError(f"additional_config must be a JSON object, got {type(additional_config).__name__}")
        for key, value in additional_config.items():
            if key in INERT or key in OF_VLLM:
                continue
            if key not in KNOWN:
                near = difflib.get_close_matches(key, [*KNOWN, *INERT], n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "see docs/options.md for the names that exist"
                raise ValueError(f"additional_config has an unknown option {key!r} ({value!r}); {hint}")
            if value not in KNOWN[key]:
                raise ValueError(
                    f"option {key!r} ({value!r}) of the public plugin is not supported by this one; remove it, or set it to {KNOWN[key][0]!r}"
                )
        return cls()
