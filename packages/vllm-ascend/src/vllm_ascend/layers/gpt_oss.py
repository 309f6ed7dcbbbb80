# SPDX-License-Identifier: Apache-2.0
"""Experts of GPT-OSS, whose weights vLLM loads with a class of its own, on ascend-moe as all others."""

from __future__ import annotations

from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

from vllm_ascend.layers.moe import AscendRoutedExperts

__all__ = ["AscendGptOssRoutedExperts", "register"]


class AscendGptOssRoutedExperts(AscendRoutedExperts, GptOssRoutedExperts):
    """`AscendRoutedExperts` whose weights lie in the checkpoint as GPT-OSS has them: gate and up columns by turns, and biases."""


def register() -> None:
    """Replace vLLM's class."""
    GptOssRoutedExperts.register_oot(AscendGptOssRoutedExperts)
