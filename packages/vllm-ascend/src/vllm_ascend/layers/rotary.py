# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers import rotary_embedding as rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase

from vllm_ascend import kernels

__all__ = ["AscendRotaryEmbedding", "OnKernel", "register"]

FUSED_HEAD_SIZES = (64, 128)  # npu_apply_rotary_pos_emb on Atlas A2 and A3


class OnKernel(RotaryEmbeddingBase):
    """Rotates query and key in one kernel, whatever the table of cosines; those of a step are gathered once for all layers."""

    def _cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[T, 1, rotary_dim]` at `positions`, each value at both places that the rotation pairs."""
        cos, sin = self._match_cos_sin_cache_dtype_to(dtype).index_select(0, positions).chunk(2, dim=-1)
        if self.is_neox_style:
            return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((sin, sin), -1).unsqueeze(1)
        return cos.repeat_interleave(2, -1).unsqueeze(1), sin.repeat_interleave(2, -1).unsqueeze(1)

    def _match_cos_sin_cache_dtype_to(self, dtype: torch.dtype) -> Tensor:
        if self.cos_sin_cache.dtype != dtype:
            self.cos_sin_cache = self.cos_sin_cache.to(dtype)
        return self.cos_sin_cache

    def _step_cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same from this step's forward context, where the first layer of the step has left it."""
        if not is_forward_context_available():
            return self._cos_sin(positions, dtype)
        kept = get_forward_context().additional_kwargs
        key = f"ascend_rotary {id(self)} {positions.data_ptr()} {positions.shape[0]} {dtype}"
        if key not in kept:
            kept[key] = positions, self._cos_sin(positions, dtype)  # positions too, lest another tensor get its address
        return kept[key][1]  # type: ignore[no-any-return]

    def forward_oot(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Query `[T, N*D]` or `[T, N, D]` and key `[T, Nkv*D]` or `[T, Nkv, D]` (or None), rotated at positions `[T]`."""
        cos, sin = self._step_cos_sin(positions.flatten(), query.dtype)
        tokens, size = cos.shape[0], self.head_size
        if key is not None and self.is_neox_style and self.rotary_dim == size and size in FUSED_HEAD_SIZES:
            q, k = query.reshape(tokens, -1, size), key.reshape(tokens, -1, size)
            q, k = kernels.apply_rotary(q.contiguous(), k.contiguous(), cos, sin)
            return q.view(query.shape), k.view(key.shape)
        return self._rotate(query, cos, sin), None if key is None else self._rotate(key, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.reshape(1, cos.shape[0], -1, self.head_size)
        rotated = kernels.rotary_mul(
            heads[..., : self.rotary_dim].contiguous(),
            cos.unsqueeze(0),
            sin.unsqueeze(0),
            interleaved=not self.is_neox_style,
        )
        if self.rotary_dim < self.head_size:
            rotated = torch.cat((rotated, heads[..., self.rotary_dim :]), dim=-1)
        return rotated.reshape(x.shape)


class AscendRotaryEmbedding(OnKernel, RotaryEmbedding):
    """`RotaryEmbedding` on the NPU kernel."""


def register() -> None:
    """Replace vLLM's layer, and those that differ from it only in how they compute the table of cosines."""
    RotaryEmbedding.register_oot(AscendRotaryEmbedding)
    for name in ("Llama3RotaryEmbedding", "LinearScalingRotaryEmbedding", "DynamicNTKScalingRotaryEmbedding",
                 "DynamicNTKAlphaRotaryEmbedding", "NTKScalingRotaryEmbedding", "YaRNScalingRotaryEmbedding",
                 "DeepseekScalingRotaryEmbedding", "Gemma4RotaryEmbedding"):  # fmt: skip
        base = getattr(rope, name)
        base.register_oot(type(f"Ascend{name}", (OnKernel, base), {"__doc__": f"{name} on the NPU kernel."}), name=name)
