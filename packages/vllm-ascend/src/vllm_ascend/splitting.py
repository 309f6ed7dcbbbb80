# SPDX-License-Identifier: Apache-2.0
"""Models that vLLM 0.32.0 computes wrongly over tensor parallel ranks or pipeline stages, or fails to build there. Those without stages (`SupportsPP`) it refuses itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ascend.deployment import Deployment

__all__ = ["broken"]

_MINICPM = ("MiniCPMForCausalLM", "MiniCPM3ForCausalLM")
_ERNIE = ("Ernie4_5_MoeForCausalLM", "Ernie4_5_VLMoeForConditionalGeneration")
_GEMMA4 = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")
# vLLM looks for a MoE layer on every stage of these.
_EXPERTS_ON_EVERY_STAGE = (
    "AfmoeForCausalLM",
    "AXK1ForCausalLM",
    "DeepseekForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Glm4MoeForCausalLM",
    "GlmMoeDsaForCausalLM",
    "HYV3ForCausalLM",
    "Llama4ForCausalLM",
    "Llama4ForConditionalGeneration",
    "PanguProMoEV2ForCausalLM",
    "PanguUltraMoEForCausalLM",
    "SarvamMLAForCausalLM",
)


def broken(vllm_config: Any, deployment: Deployment) -> Iterator[str]:
    """A finding for each reason why the model at hand cannot be split as it is asked to be.

    Args:
        vllm_config: vLLM's `VllmConfig`, whose `model_config` is there.
        deployment: the same, as this plugin reads it.
    """
    model, top = vllm_config.model_config, deployment.topology
    if top.tensor_parallel > 1:
        for reason in _over_ranks(model):
            yield f"tensor_parallel_size ({top.tensor_parallel}) must be 1 for {model.architectures[0]}{reason}"
    if top.pipeline_parallel > 1:
        for reason in (*_over_stages(model, deployment), *_without_experts(model, deployment)):
            yield f"pipeline_parallel_size ({top.pipeline_parallel}) must be 1 with {model.architecture}{reason}; give tensor_parallel_size"


def _over_ranks(model: Any) -> Iterator[str]:
    if model.architectures[0] == "BertForMaskedLM" and getattr(model.hf_config, "tie_word_embeddings", False):
        yield (
            " whose embedding is its last layer (tie_word_embeddings): vLLM's implementation copies a rank's part of the one into the whole of the other"
        )
    if model.hf_text_config.model_type == "modernbert":
        yield ": vLLM's implementation of ModernBERT takes its queries, keys and values apart as one rank has them"


def _over_stages(model: Any, deployment: Deployment) -> Iterator[str]:
    """What the model has that vLLM's code for its stages gets wrong."""
    text, architecture = model.hf_text_config, model.architecture
    if architecture == "GraniteMoeHybridForCausalLM" and deployment.model.moe.routed_experts:
        yield " that has experts: vLLM 0.32.0 loads the router of every layer on every stage"
    if architecture in _GEMMA4 and getattr(text, "hidden_size_per_layer_input", None):
        yield f" that has embeddings for each layer (hidden_size_per_layer_input {text.hidden_size_per_layer_input}): vLLM 0.32.0 leaves them out after the first stage"
    if architecture in _GEMMA4 and getattr(text, "num_kv_shared_layers", None):
        yield f" whose last layers read the keys of earlier ones (num_kv_shared_layers {text.num_kv_shared_layers}): those may lie on another stage"
    if architecture in _MINICPM:
        yield ": vLLM 0.32.0 hands on a residual that its layers do not have"
    if architecture in _ERNIE and deployment.model.tied_embeddings:
        yield " whose embedding is its LM head (tie_word_embeddings): vLLM 0.32.0 looks for both on every stage"
    planned = getattr(text, "base_model_pp_plan", None) or getattr(text, "rope_parameters", None)
    if model.using_transformers_backend() and not planned:
        yield (
            " of the Transformers backend, for which transformers has no plan of stages (base_model_pp_plan) and whose positions are not rotary: "
            "vLLM 0.32.0 guesses what comes before the layers, and adds positions on every stage"
        )


def _without_experts(model: Any, deployment: Deployment) -> Iterator[str]:
    # It needs vLLM's platform, and this module is read while that is chosen.
    from vllm.distributed.utils import get_pp_indices

    layers, count, experts = deployment.model.decoder_layers, deployment.topology.pipeline_parallel, deployment.model.moe.layers  # fmt: skip
    if model.architecture in _EXPERTS_ON_EVERY_STAGE and experts:
        for stage in range(count):
            first, end = get_pp_indices(layers, stage, count)
            if experts.isdisjoint(range(first, end)):
                yield f": stage {stage} would have layers {first} to {end - 1}, none of them with experts, and vLLM 0.32.0 needs some on every stage"
