# SPDX-License-Identifier: Apache-2.0
"""What vLLM's KV connectors need on an NPU, and which cannot be used there. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend import states
from vllm_ascend.attention import kinds
from vllm_ascend.kv_offload import limits

__all__ = ["broken", "choose"]

_WHY = "cannot be used on an NPU: its copies between the KV cache and host memory are CUDA's; give OffloadingConnector"
_EXAMPLE = "ExampleConnector"
_NIXL = "NixlConnector"


def choose(vllm_config: Any) -> None:
    """Set what a connector needs here, before vLLM asks for its class: our own for OffloadingConnector, and buffers in host memory for NIXL's.

    Args:
        vllm_config: vLLM's `VllmConfig`, not yet complete.
    """
    limits.choose(vllm_config)
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector == _NIXL:
        transfer.kv_buffer_device = "cpu"


def broken(vllm_config: Any) -> Iterator[str]:
    """Findings for the connectors of `kv_transfer_config`, those inside of a MultiConnector included.

    Args:
        vllm_config: vLLM's `VllmConfig`, whose `model_config` is there.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return
    yield from limits.broken(vllm_config)
    extra = transfer.kv_connector_extra_config or {}
    inner = [one.get("kv_connector") for one in extra.get("connectors", ()) if isinstance(one, dict)]
    names = {transfer.kv_connector, *inner}
    if limits.SIMPLE in names:
        yield f"kv_transfer_config (connector {limits.SIMPLE!r}) {_WHY}"
    if limits.CONNECTOR in inner:
        yield f"kv_transfer_config (connector {limits.CONNECTOR!r}) cannot be used within a MultiConnector: vLLM takes it with CUDA's copies there; give it alone"
    if limits.chosen(vllm_config):
        return
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
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if _NIXL in names and (stages > 1 or model.is_encoder_decoder):
        what = f"pipeline_parallel_size ({stages})" if stages > 1 else "a model with an encoder and a decoder"
        yield f"kv_transfer_config (connector {_NIXL!r}) cannot be used with {what}: no test has shown it to be right; leave one of the two out"
    refused = model.use_mla or states.has_states(model) or kinds.differ(model)  # whatever the connector
    if _EXAMPLE in names and not refused:
        yield from (
            f"kv_transfer_config (connector {_EXAMPLE!r}) cannot be used with {what}"
            for what in _not_with_the_example(vllm_config)
        )


def _not_with_the_example(vllm_config: Any) -> Iterator[str]:
    """What vLLM's example connector computes wrongly, on any device: it names what it stores by the tokens of a prompt and by a layer, and by nothing else."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if vllm_config.scheduler_config.enable_chunked_prefill:
        yield (
            "enable_chunked_prefill (True): vLLM's example stores a prompt that is computed in chunks with wrong rows at its end; give "
            "--no-enable-chunked-prefill"
        )
    if vllm_config.cache_config.enable_prefix_caching:
        yield (
            "enable_prefix_caching (True): of a prompt with one token more than whole blocks, vLLM's example has fewer tokens than the prefix cache, and the "
            "negative difference ends the engine; give --no-enable-prefix-caching"
        )
    if ranks > 1:
        yield f"tensor_parallel_size ({ranks}): vLLM's example stores the keys and values of all ranks under one name, so that each would read another's; set it to 1"
    if vllm_config.lora_config is not None:
        yield (
            "LoRA adapters (--enable-lora): vLLM's example finds what it stored by the tokens of a prompt, whichever adapter computed it; leave --enable-lora or "
            "kv_transfer_config out"
        )
