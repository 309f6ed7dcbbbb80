# SPDX-License-Identifier: Apache-2.0
"""Experts of models that vLLM runs through transformers' own classes (its "Transformers backend"), on ascend-moe as all others."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.transformers.moe import TransformersMoERunner, TransformersRoutedExperts

from vllm_ascend.layers.moe import AscendMoERunner, AscendRoutedExperts

__all__ = ["AscendTransformersMoERunner", "AscendTransformersRoutedExperts", "register"]


class AscendTransformersRoutedExperts(AscendRoutedExperts, TransformersRoutedExperts):
    """`AscendRoutedExperts` with the names that checkpoints of transformers have for the weights of experts."""


class AscendTransformersMoERunner(AscendMoERunner, TransformersMoERunner):
    """`AscendMoERunner` for a layer whose router is transformers', which hands over the experts that it has chosen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build vLLM's runner.

        Raises:
            ValueError: ranks that each take a share of the tokens, of which the router's choice is not cut.
        """
        super().__init__(*args, **kwargs)
        if self.moe_config.is_sequence_parallel:
            raise ValueError(
                f"{self.layer_name}: a model whose experts are chosen by transformers' own router is not supported by vllm-ascend over data parallel "
                "replicas of several tensor parallel ranks with expert parallelism; set data_parallel_size or tensor_parallel_size to 1"
            )


def register() -> None:
    """Replace vLLM's classes."""
    TransformersRoutedExperts.register_oot(AscendTransformersRoutedExperts)
    TransformersMoERunner.register_oot(AscendTransformersMoERunner)
