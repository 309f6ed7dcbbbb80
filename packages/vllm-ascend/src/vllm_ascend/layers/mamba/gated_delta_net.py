# SPDX-License-Identifier: Apache-2.0
"""The gated delta net of Qwen3-Next and its successors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention

from vllm_ascend.layers.mamba.delta_rule import gated_delta_rule, normalized
from vllm_ascend.layers.mamba.mixers import Recurrent
from vllm_ascend.layers.mamba.step import Batch, States, step_of

__all__ = ["AscendQwenGatedDeltaNetAttention", "register"]


class AscendQwenGatedDeltaNetAttention(Recurrent, QwenGatedDeltaNetAttention):
    """vLLM's layer, whose part between the projections and the gated norm is computed here."""

    def _forward_core(self, mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor) -> None:
        """Queries, keys and values `[T, D]`, strengths and decays before their functions `[T, H]` -> `core_attn_out` `[T, H, V]`, written."""
        step = step_of(self.prefix)
        if step is None:
            return  # vLLM has filled the output with zeros
        states = States.of(self.kv_cache)
        keys, values = (size // self.tp_size for size in (self.key_dim, self.value_dim))
        query, key, value = torch.split(self.convolved(mixed_qkv, step, states), [keys, keys, values], dim=-1)
        query, key = (normalized(each.reshape(len(each), -1, self.head_k_dim)) for each in (query, key))
        value = value.reshape(len(value), -1, self.head_v_dim)
        decay = -self.A_log.float().exp() * functional.softplus(a.float() + self.dt_bias.float())
        beta = b.float().sigmoid()

        def rule(batch: Batch, state: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v, g, strength = (batch.of(each) for each in (query, key, value, decay, beta))
            return gated_delta_rule(q, k, v, g, strength, state)

        out = states.through(states.recurrent, step, rule)
        core_attn_out[: len(out)] = out.to(core_attn_out.dtype)


def register() -> None:
    """Replace vLLM's layer."""
    QwenGatedDeltaNetAttention.register_oot(AscendQwenGatedDeltaNetAttention)
