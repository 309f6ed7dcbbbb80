# SPDX-License-Identifier: Apache-2.0
"""Models that have layers with a recurrent state: which are served, and what a user should know of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend.config import AscendConfig
from vllm_ascend.kv_offload.limits import named

__all__ = ["broken", "has_states", "notices"]

# By the kind of their layers with a state. Others have layers that vLLM computes with Triton kernels and that have no form here.
_MAMBA = ("MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM", "JambaForSequenceClassification")
_MAMBA2 = (
    "Mamba2ForCausalLM",
    "FalconH1ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "NemotronHForCausalLM",
    "Zamba2ForCausalLM",
)
_GATED_DELTA_NET = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
_SERVED = {
    **dict.fromkeys(_MAMBA, "Mamba"),
    **dict.fromkeys(_MAMBA2, "Mamba2"),
    **dict.fromkeys(_GATED_DELTA_NET, "a gated delta net"),
}

# Options for linear layers that would reach those of such layers by their names.
_NOT_WITH_STATES = ("enable_flashcomm1", "flashcomm2_parallel_size", "enable_matmul_allreduce")


def has_states(model: Any) -> bool:
    """Whether a model has such layers; `model` is vLLM's `ModelConfig`."""
    return bool(model.is_attention_free or model.is_hybrid)


def broken(vllm_config: Any, config: AscendConfig) -> Iterator[str]:
    """Findings for a model whose layers with a state are of a kind that is not served, or are served otherwise than is asked."""
    model, transfer = vllm_config.model_config, vllm_config.kv_transfer_config
    if not has_states(model):
        return
    architecture = model.architecture
    if architecture not in _SERVED:
        yield (
            f"{architecture} has layers of linear attention or a state space of a kind that vllm-ascend does not compute; it serves those of "
            f"{', '.join(_SERVED)}"
        )
        return
    if transfer is not None:
        yield (
            f"{named(vllm_config)} cannot be used with {architecture}, whose layers have states beside keys and values; "
            "leave it out"
        )
    for name in _NOT_WITH_STATES:
        if value := getattr(config, name):
            yield f"option {name!r} ({value}) cannot be used with {architecture}: its layers of {_SERVED[architecture]} take all tokens on every rank; leave it out"


def notices(model: Any) -> Iterator[str]:
    """What a user should know of such a model."""
    if has_states(model):
        kind = _SERVED[model.architecture]
        yield f"no kernel computes layers of {kind}: they are computed by single operators, each prompt on its own; expect a fraction of the usual speed"
