# SPDX-License-Identifier: Apache-2.0
"""Mamba's and Mamba2's mixers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from vllm_ascend.layers.mamba.convolution import causal_convolution
from vllm_ascend.layers.mamba.scan import selective_scan, state_space
from vllm_ascend.layers.mamba.step import AscendStateBackend, Batch, RecurrentStep, States, step_of

__all__ = ["AscendMambaMixer", "AscendMambaMixer2", "Recurrent", "register"]


class Recurrent(MambaBase):
    """What the replacements of vLLM's layers have in common."""

    conv1d: Any
    prefix: str

    def get_attn_backend(self) -> type[AscendStateBackend]:
        """The one whose steps these layers read."""
        return AscendStateBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """One state a request. Mamba2's own asks for a second one within a prompt, which its kernels can write; here the scheduler ends a step there."""
        return MambaBase.get_kv_cache_spec(self, vllm_config)

    def convolved(self, rows: Tensor, step: RecurrentStep, states: States) -> Tensor:
        """Rows `[tokens, D]` after the convolution."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        return states.through(
            states.windows, step, lambda batch, window: causal_convolution(batch.of(rows), window, weight, bias)
        )


class AscendMambaMixer(Recurrent, MambaMixer):
    """Mamba."""

    def forward_impl(self, hidden_states: Tensor, output: Tensor) -> None:
        """Hidden states `[T, hidden]` -> `output`, written; zero without requests."""
        step = step_of(self.prefix)
        if step is None:
            output.zero_()
            return
        states = States.of(self.kv_cache)
        x, gate = self.in_proj(hidden_states)[0].chunk(2, dim=-1)
        x = self.convolved(x, step, states)
        dt, b, c = self._ssm_transform(x)
        dt = functional.softplus(dt.t().float() + self.dt_proj.bias.float())

        def scan(batch: Batch, state: Tensor) -> tuple[Tensor, Tensor]:
            return selective_scan(batch.of(x), batch.of(dt), self.A, batch.of(b), batch.of(c), self.D, state)

        y = states.through(states.recurrent, step, scan) * functional.silu(gate[: len(x)].float())
        output[: len(x)] = self.out_proj(y.to(x.dtype))[0]
        output[len(x) :].zero_()


class AscendMambaMixer2(Recurrent, MambaMixer2):
    """Mamba2."""

    def conv_ssm_forward(self, projected_states: Tensor, output: Tensor) -> None:
        """Projected states `[T, gate + D + heads]` -> `output` `[T, heads * P]`, written; zero without requests."""
        step = step_of(self.prefix)
        if step is None:
            output.zero_()
            return
        states = States.of(self.kv_cache)
        rows = projected_states[:, self.tped_intermediate_size :]
        rows, dt = torch.split(rows, [self.tped_conv_size, self.tped_dt_size], dim=-1)
        x, b, c = self.split_hidden_states_B_C_fn(self.convolved(rows, step, states))  # type: ignore[no-untyped-call]
        x = x.reshape(len(x), -1, self.head_dim)
        b, c = (each.reshape(len(x), -1, self.ssm_state_size) for each in (b, c))
        dt = functional.softplus(dt.float() + self.dt_bias.float())

        def scan(batch: Batch, state: Tensor) -> tuple[Tensor, Tensor]:
            return state_space(batch.of(x), batch.of(dt), self.A, batch.of(b), batch.of(c), self.D, state)

        y = states.through(states.recurrent, step, scan)
        output[: len(y)] = y.flatten(1).to(output.dtype)
        output[len(y) :].zero_()


def register() -> None:
    """Replace vLLM's layers."""
    MambaMixer.register_oot(AscendMambaMixer)
    MambaMixer2.register_oot(AscendMambaMixer2)
