# SPDX-License-Identifier: Apache-2.0
"""How a configuration comes to this plugin's OffloadingConnector, and with what that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vllm_ascend import envs

__all__ = ["CONNECTOR", "SIMPLE", "broken", "choose", "chosen", "named"]

CONNECTOR = "OffloadingConnector"
SIMPLE = "SimpleCPUOffloadConnector"
_MODULE = "vllm_ascend.kv_offload.connector"
_SPEC = {"spec_name": "AscendOffloadingSpec", "spec_module_path": "vllm_ascend.kv_offload.spec"}
_OF_VLLM = "CPUOffloadingSpec"  # vLLM's default, which `_SPEC` takes the place of


def choose(vllm_config: Any) -> None:
    """Let vLLM take its OffloadingConnector from here, with our spec, by the options that it has for connectors and specs of others.

    `kv_offloading_size` is turned into a connector by vLLM as well, but after everything here has been checked.

    Args:
        vllm_config: vLLM's `VllmConfig`, not yet complete.
    """
    if _by_size(vllm_config) and _other(vllm_config) is None:
        from vllm.config import KVTransferConfig

        cache = vllm_config.cache_config
        transfer = vllm_config.kv_transfer_config = vllm_config.kv_transfer_config or KVTransferConfig()
        transfer.kv_connector = SIMPLE if envs.wants_simple_kv_offload() else CONNECTOR
        transfer.kv_role = "kv_both"
        transfer.kv_connector_extra_config["cpu_bytes_to_use"] = cache.kv_offloading_size * (1 << 30)
    transfer = vllm_config.kv_transfer_config
    if (
        transfer is None
        or transfer.kv_connector != CONNECTOR
        or transfer.kv_connector_module_path not in (None, _MODULE)
    ):
        return
    transfer.kv_connector_module_path = _MODULE
    extra = transfer.kv_connector_extra_config
    if extra.get("spec_name", _OF_VLLM) == _OF_VLLM:
        extra.update(_SPEC)


def _by_size(vllm_config: Any) -> bool:
    """Whether vLLM makes a connector of `kv_offloading_size`."""
    cache = vllm_config.cache_config
    return cache.kv_offloading_size is not None and cache.kv_offloading_backend == "native"


def _other(vllm_config: Any) -> str | None:
    """The connector that a user has named, if it is none that offloads."""
    transfer = vllm_config.kv_transfer_config
    named = None if transfer is None else transfer.kv_connector
    return None if named in (None, CONNECTOR, SIMPLE) else named


def chosen(vllm_config: Any) -> bool:
    """Whether `choose` has chosen our connector."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector_module_path == _MODULE


def named(vllm_config: Any) -> str:
    """The option by which a user asked for a connector, with its value."""
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    if _by_size(vllm_config) and _other(vllm_config) is None:
        return f"kv_offloading_size ({cache.kv_offloading_size})"
    return f"kv_transfer_config (connector {transfer.kv_connector!r})"


def broken(vllm_config: Any) -> Iterator[str]:
    """Findings for what our connector cannot do; none where another one is asked for, or none.

    Args:
        vllm_config: vLLM's `VllmConfig`, whose `model_config` is there.
    """
    if _by_size(vllm_config) and (other := _other(vllm_config)):
        size = vllm_config.cache_config.kv_offloading_size
        yield f"kv_offloading_size ({size}) cannot be used with kv_transfer_config (connector {other!r}), whose place vLLM gives to {CONNECTOR}; leave one of the two out"
    if not chosen(vllm_config):
        return
    name, extra = named(vllm_config), vllm_config.kv_transfer_config.kv_connector_extra_config
    if extra["spec_name"] != _SPEC["spec_name"] and "spec_module_path" not in extra:
        yield f"kv_connector_extra_config.spec_name ({extra['spec_name']!r}): its copies are CUDA's; leave it out, for blocks in host memory"
    if extra.get("canonical_layout"):
        yield "kv_connector_extra_config.canonical_layout (True): a block's keys lie apart from its values here; leave it out"
    yield from _wrong_with_the_memory(vllm_config, name, extra.get("cpu_bytes_to_use"))
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        yield (
            f"{name} cannot be used with pipeline_parallel_size ({stages}): stages whose blocks differ in size would count different chunks in host memory; "
            "give tensor_parallel_size instead"
        )
    if vllm_config.model_config.is_encoder_decoder:
        yield f"{name} cannot be used with a model with an encoder and a decoder: no test has shown it to be right; leave it out"


def _wrong_with_the_memory(vllm_config: Any, name: str, asked: Any) -> Iterator[str]:
    if not isinstance(asked, int | float) or asked <= 0:
        yield f"{name} needs the bytes of host memory that it may take: kv_connector_extra_config.cpu_bytes_to_use ({asked!r}) must be a number above 0"
        return
    parallel, memory = vllm_config.parallel_config, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    replicas = parallel.data_parallel_size_local if parallel.data_parallel_rank_local is None else 1
    here = asked * replicas / parallel.nnodes_within_dp
    if here > memory:
        yield (
            f"{name} asks for {here / 2**30:.1f} GiB of this host's memory, for {replicas} data parallel replicas on it, and it has {memory / 2**30:.1f} GiB; "
            "give a smaller size"
        )
