# SPDX-License-Identifier: Apache-2.0
"""Attention of towers that vLLM takes from transformers (Qwen2-Audio, Audio Flamingo 3, Gemma 3n, Gemma 4), by transformers' own interface for that.

transformers computes it by the function that is registered as "sdpa", which calls torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_ascend.attention import kernels

__all__ = ["attend", "register"]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In one NPU kernel where it has the form that is asked for; else as transformers does.

    Args:
        module: the layer.
        query: `[B, N, S, D]`.
        key, value: `[B, Nkv, S2, D]`.
        attention_mask: `[B, 1, S, S2]`: bool, True where a query sees a key; or numbers that are added to scores. transformers takes each one but 0 for a key
            that is not seen, on an NPU, and so it is here.
        dropout, scaling, is_causal, kwargs: as of transformers' function.

    Returns:
        `[B, S, N, D]`, contiguous, and None in the place of weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not (
        _has_form(query, attention_mask, causal=causal)
        and not dropout
        and not kwargs.get("cache")
        and kwargs.get("position_bias") is None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    hidden = None
    if attention_mask is not None:
        hidden = attention_mask.logical_not() if attention_mask.dtype == torch.bool else attention_mask != 0
        hidden = hidden.expand(-1, -1, query.shape[2], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kernels.attention_with_mask(query, key, value, hidden, scale).transpose(1, 2).contiguous(), None


def _has_form(query: Tensor, mask: Tensor | None, *, causal: bool) -> bool:
    """Whether the kernel has it: on an NPU, heads of at most 512 numbers, and no mask or one for all heads."""
    if query.device.type != "npu" or query.shape[-1] > kernels.WIDE_HEAD_SIZE:
        return False
    if mask is None:
        return not causal or query.shape[2] == 1
    return mask.dim() == 4 and mask.shape[1] == 1


def register() -> None:
    """Take the place of transformers' function in this process."""
    AttentionInterface.register("sdpa", attend)
