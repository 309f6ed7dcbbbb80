# SPDX-License-Identifier: Apache-2.0
"""Everything that is known to be wrong with a run before its worker processes start, found in one place and raised as one error.

What only a device can say, `attention/probe.py` asks in the worker before it loads the model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from vllm_ascend import envs, experts, ray_cluster, rules, splitting, states, transfer
from vllm_ascend.attention import BACKENDS, kinds
from vllm_ascend.config import AscendConfig
from vllm_ascend.deployment import Deployment
from vllm_ascend.eplb.placement import placement_of
from vllm_ascend.findings import found_by, refuse
from vllm_ascend.lora import limits as adapters
from vllm_ascend.moe_layers import ConfigReader
from vllm_ascend.quantization import foreign
from vllm_ascend.sleep import limits as sleep
from vllm_ascend.speculative import support as speculation
from vllm_ascend.weight_transfer import limits as weight_transfer

__all__ = ["Host", "check", "notices", "too_short_for_pictures"]

# Families of chips that this plugin does not support, and how the names of their chips begin: the attention kernels do not run there.
_ABSENT_CHIPS = {"Atlas 300I (310P)": "Ascend310P", "Atlas A5 (950)": "Ascend950"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The NPUs of this host, as far as they are known without initialising one.

    Args:
        devices: visible NPUs.
        chip: their name, such as "Ascend910B3".
    """

    devices: int
    chip: str


def check(vllm_config: Any, host: Host) -> AscendConfig:
    """Check vLLM's whole configuration, with this plugin's options.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        host: the devices here.

    Returns:
        The options.

    Raises:
        ValueError: everything that is wrong, each finding with the name, the value and what is allowed.
    """
    config, found = AscendConfig.read(vllm_config.additional_config, envs.retired_variables())
    found += found_by(envs.hccl_buffsize_mb)
    found += _absent_of_vllm(vllm_config)
    found += _wrong_with_the_host(vllm_config.parallel_config, host)
    found += ray_cluster.broken(vllm_config.parallel_config, sys.modules.get("ray"))
    if vllm_config.model_config is not None:
        deployment = Deployment.of(vllm_config)
        found += _absent_for_the_model(vllm_config)
        found += states.broken(vllm_config, config)
        found += splitting.broken(vllm_config, deployment)
        found += speculation.broken(vllm_config)
        found += kinds.broken(vllm_config)
        found += adapters.broken(vllm_config, config)
        found += sleep.broken(vllm_config, config)
        found += weight_transfer.broken(vllm_config, config)
        found += transfer.broken(vllm_config)
        found += foreign.broken(vllm_config, config)
        found += rules.broken(config, deployment)
        found += rules.broken_on(config, host.chip)
        found += _wrong_with_experts(config, deployment, experts.most_decoded(vllm_config), host)
    refuse(found)
    return config


def notices(vllm_config: Any) -> list[str]:
    """What a user should know of a configuration that has passed `check`."""
    of_ray = ray_cluster.notices(vllm_config.parallel_config, sys.modules.get("ray"))
    if vllm_config.model_config is None:
        return of_ray
    return [*of_ray, *kinds.notices(vllm_config), *states.notices(vllm_config.model_config)]


def _absent_of_vllm(vllm_config: Any) -> Iterator[str]:
    """Findings for what this plugin does not have, whatever the model."""
    parallel, offload = vllm_config.parallel_config, vllm_config.offload_config
    if envs.wants_v2_model_runner():
        yield "VLLM_USE_V2_MODEL_RUNNER=1: vllm-ascend serves vLLM's V1 model runner only; unset it or set it to 0"
    if asked := _of_vllms_load_balancing(parallel):
        yield (
            f"{', '.join(asked)}: vLLM's own balancing of experts does not run on this platform; give its counterpart, "
            f"--additional-config '{json.dumps({'eplb_config': _as_our_load_balancing(parallel)})}'"
        )
    profiler = vllm_config.profiler_config
    if profiler.profiler not in (None, "torch"):
        yield f"profiler_config.profiler ({profiler.profiler!r}) must be 'torch' on an NPU, which is torch_npu's profiler here"
    if profiler.profiler and profiler.torch_profiler_activities not in (None, ["CPU"]):
        yield (
            f"profiler_config.torch_profiler_activities ({profiler.torch_profiler_activities}) must be ['CPU'] on an NPU; without it the device is recorded too"
        )
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            yield f"{name} ({size}) must be 1: the attention backends of vllm-ascend do not spread a request's keys over ranks"
    if offload.uva.cpu_offload_gb and not envs.offloads_without_unified_memory():
        yield (
            f"cpu_offload_gb ({offload.uva.cpu_offload_gb}) needs a view of host memory that an NPU does not have; leave it out, "
            "or set VLLM_WEIGHT_OFFLOADING_DISABLE_UVA=1"
        )


def _of_vllms_load_balancing(parallel: Any) -> list[str]:
    """What vLLM's own options of expert load balancing ask for, as the user gives them. vLLM 0.32 itself refuses the first one on this platform."""
    asked, given = parallel.eplb_config, ["--enable-eplb"] if parallel.enable_eplb else []
    defaults = type(asked)()
    changed = {
        item.name: getattr(asked, item.name)
        for item in fields(asked)
        if getattr(asked, item.name) != getattr(defaults, item.name)
    }
    return given + [f"--eplb-config.{name} ({value!r})" for name, value in changed.items()]


def _as_our_load_balancing(parallel: Any) -> dict[str, Any]:
    """The options of this plugin that come nearest to vLLM's. Its window is in steps, and here in intervals."""
    asked = parallel.eplb_config
    found: dict[str, Any] = {"dynamic_eplb": True, "expert_heat_collection_interval": asked.step_interval}
    if asked.num_redundant_experts:
        found["num_redundant_experts"] = asked.num_redundant_experts
    return found | {"load_window": max(asked.window_size // asked.step_interval, 1), "load_weighting": "mean"}


def _wrong_with_the_host(parallel: Any, host: Host) -> Iterator[str]:
    for family, chip in _ABSENT_CHIPS.items():
        if host.chip.startswith(chip):
            yield f"this host's chip, {host.chip}, is of the family {family}, which vllm-ascend does not support; serve on an Atlas A2 (Ascend910B) or A3 (Ascend910_93)"
    if parallel.distributed_executor_backend not in (None, "mp", "uni") or parallel.nnodes > 1:
        return  # the ranks are not all on this host
    rank = parallel.data_parallel_rank_local  # None: this process starts all replicas of this host
    replicas = parallel.data_parallel_size_local if rank is None else rank + 1
    needed = replicas * parallel.world_size
    if needed > host.devices:
        yield (
            f"{needed} NPUs are needed on this host, for {replicas} data parallel replicas of {parallel.world_size} ranks, and {host.devices} are "
            "visible; lower the parallel sizes or widen ASCEND_RT_VISIBLE_DEVICES"
        )


def _wrong_with_experts(
    config: AscendConfig, deployment: Deployment, decoding_tokens: int, host: Host
) -> Iterator[str]:
    """Findings for how experts communicate, where it is known where they lie."""

    if not deployment.model.moe.routed_experts:
        return
    try:
        placement, buffer = placement_of(config.eplb_config, deployment), envs.hccl_buffsize_mb()
    except ValueError:  # other findings say so
        return
    yield from experts.broken(
        deployment,
        slots_per_rank=placement.slots_per_rank,
        device_name=host.chip,
        decoding_tokens=decoding_tokens,
        hccl_buffsize_mb=buffer,
    )


def _absent_for_the_model(vllm_config: Any) -> Iterator[str]:
    """Findings for what this plugin does not have for the model at hand."""
    model, attention = vllm_config.model_config, vllm_config.attention_config
    name = BACKENDS[model.use_mla][0]
    asked = {"attention_config.backend": attention.backend}
    asked |= {
        f"attention_config.backend_per_kind[{kind!r}]": backend for kind, backend in attention.backend_per_kind.items()
    }
    asked |= {"attention_config.mla_prefill_backend": attention.mla_prefill_backend}
    for option, backend in asked.items():
        if backend is not None and backend.name != name:
            yield f"{option} ({backend.name!r}) is not a backend of vllm-ascend for this model; leave it out, or give {name!r}"
    yield from _beyond_the_rotary_table(model)
    yield from too_short_for_pictures(model, vllm_config.scheduler_config)


def too_short_for_pictures(model: Any, scheduler: Any) -> Iterator[str]:
    """A limit on a prompt's tokens in a step, below which a picture would wait without end: `scheduler.WholePictures` never cuts one."""
    if model.is_mm_prefix_lm and (limit := scheduler.long_prefill_token_threshold):
        yield (
            f"long_prefill_token_threshold ({limit}) cannot be used with {model.architectures[0]}: all tokens of a picture see each other and are computed "
            "in one step, which may need more of them; leave it out"
        )


def _beyond_the_rotary_table(model: Any) -> Iterator[str]:
    """vLLM accepts `factor` times as many positions for a dynamic rotary embedding as it computes cosines for."""
    text = ConfigReader(model.hf_text_config)
    rope, positions = text.get("rope_parameters", default={}), text.number("max_position_embeddings")
    dynamic = isinstance(rope, dict) and rope.get("rope_type") == "dynamic" and "alpha" not in rope
    if dynamic and positions and model.max_model_len > positions:
        yield (
            f"max_model_len ({model.max_model_len}) must be at most max_position_embeddings ({positions}) of this model: vLLM computes its dynamic rotary "
            "embedding for so many positions"
        )
