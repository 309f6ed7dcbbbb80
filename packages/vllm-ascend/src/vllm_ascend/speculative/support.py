# SPDX-License-Identifier: Apache-2.0
"""Which speculative decoding is served: everything else is refused before workers start, for no test has shown it to be right."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from vllm_ascend import features
from vllm_ascend.attention import kinds

__all__ = ["broken", "drafts_by_model"]

# Methods whose drafts are made on the host from the text alone, and the package that each needs with the extra of this plugin that has it.
_OF_TEXT = {"ngram": ("numba", "ngram"), "suffix": ("arctic_inference", "suffix")}
_OF_MODELS = ("draft_model", "eagle", "eagle3", "medusa", "mtp")
# Methods of models over several ranks of a kind. Drafts of the text alone are the same over all.
_OVER_RANKS = {
    "tensor_parallel_size": ("draft_model", "eagle", "mtp"),
    "data_parallel_size": ("draft_model", "mtp"),
}
# Methods for models that are quantised.
_OF_QUANTISED = ("draft_model", *_OF_TEXT)
_MTP = ("deepseek_mtp", "glm4_moe_mtp")
_MOST_TOKENS = 128  # vLLM's rejection sampler asserts it in a step
# What vLLM's `SpeculativeConfig` has beside methods, and the only values that are served.
_ONLY = {
    "parallel_drafting": (False,),
    "use_heterogeneous_vocab": (False,),
    "rejection_sample_method": ("standard", "synthetic"),
    "num_speculative_tokens_per_batch_size": (None,),
}


def drafts_by_model(vllm_config: Any) -> bool:
    """Whether a second model, or layers of its own, draft tokens."""
    draft = vllm_config.speculative_config
    return draft is not None and draft.method in _OF_MODELS


def broken(vllm_config: Any) -> Iterator[str]:
    """Findings for speculative decoding that is not served, of vLLM's `VllmConfig`."""
    draft = vllm_config.speculative_config
    if draft is None or vllm_config.model_config.runner_type == "draft":
        return  # vLLM has every configuration checked, also that which it makes for the draft model from the one that was checked before
    method, advice = draft.method, "leave --speculative-config out"
    if method not in (*_OF_TEXT, *_OF_MODELS):
        named = ", ".join(map(repr, sorted((*_OF_TEXT, *_OF_MODELS))))
        yield f"speculative_config.method ({method!r}) is not served by vllm-ascend, which has {named}"
        return
    if method in _OF_TEXT and find_spec(_OF_TEXT[method][0]) is None:
        package, extra = _OF_TEXT[method]
        yield f"speculative_config.method ({method!r}) needs the package {package}, which is not installed: uv pip install './packages/vllm-ascend[{extra}]'"
    if draft.num_speculative_tokens > _MOST_TOKENS:
        yield f"speculative_config.num_speculative_tokens ({draft.num_speculative_tokens}) must be at most {_MOST_TOKENS}"
    for name, served in _ONLY.items():
        if (value := getattr(draft, name)) not in served:
            yield f"speculative_config.{name} ({value!r}) must be {' or '.join(map(repr, served))}"
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:  # vLLM's V1 model runner asks stages for a drafter that only the last one has
        yield f"pipeline_parallel_size ({stages}) must be 1 with speculative decoding (method {method!r}); {advice}, or raise tensor_parallel_size instead"
    for what in _beside(vllm_config):
        yield f"speculative decoding (method {method!r}) cannot be used with {what}; {advice}, or that"
    if method in _OF_MODELS:
        yield from _broken_of_models(vllm_config)


def _beside(vllm_config: Any) -> Iterator[str]:
    """What is not served together with this method, most of it with none."""
    of_models = (features.POOLING, features.ENCODER_DECODER, features.STATES, features.MULTIMODAL)
    switched_on = (features.PROMPT_EMBEDS, features.SLEEP, features.LORA, features.KV_CONNECTORS)
    yield from features.used(vllm_config, *of_models, *switched_on)
    quantised_by = vllm_config.model_config.quantization
    if quantised_by is not None and vllm_config.speculative_config.method not in _OF_QUANTISED:
        yield f"models quantised by {quantised_by!r}"
    if options := vllm_config.additional_config:
        yield f"options of additional_config ({', '.join(options)})"


def _broken_of_models(vllm_config: Any) -> Iterator[str]:
    """What is not served of methods for which a second model drafts."""
    draft, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    asked = f"speculative_config.method ({draft.method!r})"
    kind = draft.draft_model_config.hf_config.model_type
    if draft.method == "mtp" and kind not in _MTP:
        yield f"{asked} is served for DeepSeek-V3 and GLM4-MoE, and this model's drafts are of the kind {kind!r}; leave --speculative-config out"
    for name, methods in _OVER_RANKS.items():
        if (ranks := getattr(parallel, name)) > 1 and draft.method not in methods:
            yield f"{asked} needs {name} 1, got {ranks}"
    if parallel.tensor_parallel_size > 1 and parallel.data_parallel_size > 1:
        yield f"{asked} needs tensor_parallel_size ({parallel.tensor_parallel_size}) or data_parallel_size ({parallel.data_parallel_size}) to be 1"
    if draft.method == "medusa":
        return
    its_own = {"model_config": draft.draft_model_config, "parallel_config": draft.draft_parallel_config}
    rest = {name: getattr(vllm_config, name) for name in ("cache_config", "scheduler_config")}
    for finding in kinds.broken(SimpleNamespace(**its_own, **rest)):
        yield f"of the draft model {draft.draft_model_config.model!r}: {finding}"
