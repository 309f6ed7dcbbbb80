# SPDX-License-Identifier: Apache-2.0
"""AscendConfig: this plugin's options, given as `--additional-config '{...}'`, under the names that the public plugin uses.

Here each value is checked on its own. What options ask of each other, of the parallel sizes and of the model is checked in `rules`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ascend_linear.state import FLASHCOMM1_DENSE_THRESHOLD

__all__ = ["LAYOUTS", "AscendConfig", "EplbConfig", "FinegrainedTP", "PrefetchRatio", "WeightPrefetch"]

LAYOUTS = ("spread", "checkpoint")
# Options of the public plugin that this version does not have, by their path: the values that ask for nothing.
KNOWN: Mapping[str, tuple[Any, ...]] = {
    "enable_dsa_cp": (False,),  # context parallelism of DeepSeek sparse attention, which has no attention backend here
    "multistream_overlap_shared_expert": (False,),
    "multistream_overlap_gate": (False,),
    "eplb_config.dynamic_eplb": (False,),  # experts that move while the engine runs
    "eplb_config.expert_map_record_path": (None,),
    "eplb_config.algorithm_execution_interval": (30,),
    "eplb_config.eplb_policy_type": (0, 1),
    "eplb_config.eplb_heat_collection_stage": ("all",),
    "enable_fused_mc2": (0, False),
    "enable_prefill_mc2": (False,),
    "enable_mc2_hierarchy_comm": (False,),
    "mega_moe_max_tokens": (65536,),
    "weight_nz_mode": (0, 1),  # a memory format of weights: the default there; here they keep their own
    "enable_mlapo": (True, False),  # one kernel for what comes before latent attention; here it is several
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

_Options = TypeVar("_Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinegrainedTP:
    """`finegrained_tp_config`: ranks along data parallel that share a kind of layer; 0 leaves it to the TP group.

    Args:
        lmhead_tensor_parallel_size: of the LM head.
        oproj_tensor_parallel_size: of o_proj; needs tensor_parallel_size 1.
        embedding_tensor_parallel_size: of the token embedding.
        mlp_tensor_parallel_size: of the dense MLPs.
    """

    lmhead_tensor_parallel_size: int = 0
    oproj_tensor_parallel_size: int = 0
    embedding_tensor_parallel_size: int = 0
    mlp_tensor_parallel_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _AttentionRatio:
    qkv: float = 1.0
    o: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _MoeRatio:
    gate_up: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class _MlpRatio:
    gate_up: float = 1.0
    down: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchRatio:
    """`prefetch_ratio`: the share of each weight that is prefetched, 0 to 1. That of `moe` is not used yet."""

    attn: _AttentionRatio = field(default_factory=_AttentionRatio)
    moe: _MoeRatio = field(default_factory=_MoeRatio)
    mlp: _MlpRatio = field(default_factory=_MlpRatio)

    @property
    def by_module(self) -> dict[str, float]:
        """As `ascend_linear.PrefetchConfig` takes them."""
        return {"qkv": self.attn.qkv, "o": self.attn.o, "gate_up": self.mlp.gate_up, "down": self.mlp.down}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPrefetch:
    """`weight_prefetch_config`: whether and how much of the next layer's weight is brought into the L2 cache ahead."""

    enabled: bool = False
    prefetch_ratio: PrefetchRatio = field(default_factory=PrefetchRatio)


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbConfig:
    """`eplb_config`: on which rank each expert lies. Nothing moves while the engine runs.

    Args:
        expert_map_path: a placement file in any format of ascend-eplb; "": `layout` says where experts lie.
        num_redundant_experts: slots beyond one for each expert, in each layer; with a file, what the file has, or 0.
        layout: "spread" or "checkpoint" (an option of this plugin alone); see ascend-eplb.
        expert_load_record_path: where rank 0 writes how many tokens each expert got, .npz, .npy or .json; "": nowhere (of this plugin alone).
        expert_heat_collection_interval: steps that one entry of that file sums up.
    """

    expert_map_path: str = ""
    num_redundant_experts: int = 0
    layout: str = "spread"
    expert_load_record_path: str = ""
    expert_heat_collection_interval: int = 400

    def __post_init__(self) -> None:
        """Check what needs neither the model nor the ranks."""
        path = "option 'eplb_config."
        if self.layout not in LAYOUTS:
            raise ValueError(f"{path}layout' ({self.layout!r}) must be one of {', '.join(LAYOUTS)}")
        if self.expert_map_path and self.layout != LAYOUTS[0]:
            raise ValueError(
                f"{path}layout' ({self.layout!r}) cannot be used with expert_map_path: the file says where experts lie"
            )
        if self.expert_heat_collection_interval < 1:
            raise ValueError(
                f"{path}expert_heat_collection_interval' ({self.expert_heat_collection_interval}) must be 1 or more"
            )
        if self.expert_load_record_path and not self.expert_load_record_path.endswith((".npz", ".npy", ".json")):
            raise ValueError(
                f"{path}expert_load_record_path' ({self.expert_load_record_path!r}) must end in .npz, .npy or .json"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AscendConfig:
    """This plugin's options, each of the right type.

    Args:
        enable_flashcomm1: tokens split over TP between the layers.
        flashcomm1_dense_threshold: tokens of a step up to which a dense model does without it (an option of this plugin alone).
        flashcomm2_parallel_size: shards of o_proj under FlashComm2; 1 keeps it whole, 0 is off.
        enable_matmul_allreduce: product and all-reduce in one kernel.
        layer_sharding: modules whose layers are spread over ranks; o_proj with FlashComm2.
        enable_shared_expert_dp: shared experts whole on every rank, which computes its share of the tokens.
        finegrained_tp_config: TP sizes per module.
        weight_prefetch_config: weight prefetch.
        eplb_config: where experts lie.
    """

    enable_flashcomm1: bool = False
    flashcomm1_dense_threshold: int = FLASHCOMM1_DENSE_THRESHOLD
    flashcomm2_parallel_size: int = 0
    enable_matmul_allreduce: bool = False
    layer_sharding: tuple[str, ...] = ()
    enable_shared_expert_dp: bool = False
    finegrained_tp_config: FinegrainedTP = field(default_factory=FinegrainedTP)
    weight_prefetch_config: WeightPrefetch = field(default_factory=WeightPrefetch)
    eplb_config: EplbConfig = field(default_factory=EplbConfig)

    @classmethod
    def of(cls, additional_config: object, retired_variables: Mapping[str, str] | None = None) -> AscendConfig:
        """Read what the user gave.

        Args:
            additional_config: vLLM's `additional_config`.
            retired_variables: variables of the public plugin that are set, with the key that took their place ("" for none).

        Raises:
            ValueError: naming the option, its value and the remedy, for an unknown key, a known one that this plugin does not have, a value
                of the wrong type, and a variable that the public plugin read.
        """
        for name, key in (retired_variables or {}).items():
            remedy = f"use --additional-config '{{\"{key}\": ...}}'" if key else "unset it"
            raise ValueError(f"environment variable {name} belongs to the public plugin and is not read here; {remedy}")
        if not isinstance(additional_config, Mapping):
            raise ValueError(f"additional_config must be a JSON object, got {type(additional_config).__name__}")
        return _read(cls, {key: value for key, value in additional_config.items() if key not in (*INERT, *OF_VLLM)}, "")


def _unknown(key: str, value: object, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see docs/options.md for the names that exist"
    return f"unknown option {key!r} ({value!r}); {hint}"


def _read(cls: type[_Options], given: object, path: str) -> _Options:
    """A config class from a JSON object whose keys are its fields, or known and asking for nothing. null leaves a field at its default.

    Raises:
        ValueError: an unknown key, a known one that asks for something, or a value of the wrong type, named by its path.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"option {path.rstrip('.')!r} ({given!r}) must be an object with the keys {_names(cls)}")
    defaults = cls()
    known = [name.removeprefix(path) for name in KNOWN if name.startswith(path) and "." not in name.removeprefix(path)]
    names = [*_names(cls), *known, *(() if path else INERT)]
    read: dict[str, Any] = {}
    for key, value in given.items():
        if key not in names:
            where = f"option {path.rstrip('.')!r}" if path else "additional_config"
            raise ValueError(f"{where} has an {_unknown(key, value, names)}")
        if key in known:
            _ask_for_nothing(f"{path}{key}", value)
        elif value is not None:
            read[key] = _read_value(getattr(defaults, key), value, f"{path}{key}")
    return cls(**read)


def _ask_for_nothing(path: str, value: object) -> None:
    """ValueError if `value` of the known option at `path` asks for something."""
    if value not in KNOWN[path]:
        raise ValueError(
            f"option {path!r} ({value!r}) of the public plugin is not supported by this one; remove it, or set it to {KNOWN[path][0]!r}"
        )


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def _read_value(default: Any, value: Any, path: str) -> Any:
    """`value` as the type that `default` has, or a ValueError."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        allowed, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        allowed, fits = "a whole number, 0 or more", is_number and isinstance(value, int) and value >= 0
    elif isinstance(default, float):
        allowed, fits = "a number from 0 to 1", is_number and 0 <= value <= 1
    elif isinstance(default, str):
        allowed, fits = "a text", isinstance(value, str)
    elif isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
        allowed, value = "a list of names", tuple(value) if fits else value
    else:
        return _read(type(default), value, f"{path}.")
    if not fits:
        raise ValueError(f"option {path!r} ({value!r}) must be {allowed}")
    return value
