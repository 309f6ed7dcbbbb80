# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's KV connectors cannot be used on an NPU. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend import states
from vllm_ascend.attention import kinds

__all__ = ["broken"]

_OFFLOADING = ("OffloadingConnector", "SimpleCPUOffloadConnector")
_WHY = "cannot be used on an NPU: vLLM's copies between the KV cache and host memory are CUDA's; leave it out"
_EXAMPLE = "ExampleConnector"


def broken(vllm_config: Any) -> Iterator[str]:
    """Findings for the connectors of `kv_transfer_config`, those inside of a MultiConnector included.

    Args:
        vllm_config: vLLM's `VllmConfig`, whose `model_config` is there.
    """
    cache = vllm_config.cache_config
    if cache.kv_offloading_size is not None and cache.kv_offloading_backend == "native":
        yield f"kv_offloading_size ({cache.kv_offloading_size}) {_WHY}"
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return
    extra = transfer.kv_connector_extra_config or {}
    inner = [one.get("kv_connector") for one in extra.get("connectors", ()) if isinstance(one, dict)]
    names = {transfer.kv_connector, *inner}
    model = vllm_config.model_config
    if model.use_mla:
        yield (
            f"kv_transfer_config (connector {transfer.kv_connector!r}) cannot be used with multi-head latent attention: the cache's blocks do "
            "not lie in one piece here; leave it out"
        )
    if kinds.differ(model) and not model.use_mla:
        yield (
            f"kv_transfer_config (connector {transfer.kv_connector!r}) cannot be used with a model whose layers differ in their heads: no test has shown that "
            "connectors find keys in blocks of several sizes; leave it out"
        )
    for name in sorted(names.intersection(_OFFLOADING)):
        yield f"kv_transfer_config (connector {name!r}) {_WHY}"
    refused = model.use_mla or states.has_states(model) or kinds.differ(model)  # whatever the connector
    if _EXAMPLE in names and vllm_config.scheduler_config.enable_chunked_prefill and not refused:
        yield (
            f"kv_transfer_config (connector {_EXAMPLE!r}) cannot be used with enable_chunked_prefill (True): vLLM's example stores a prompt that is computed in chunks "
            "with wrong rows at its end; give --no-enable-chunked-prefill"
        )
