# SPDX-License-Identifier: Apache-2.0
"""Unquantised MoE layers in plain torch: the simplest correct path, one expert after the other. ascend-moe's kernels will take its place."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

__all__ = ["AscendUnquantizedFusedMoEMethod", "register"]


class AscendUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
    """Every local expert over its tokens; SwiGLU alone."""

    @property
    def is_monolithic(self) -> bool:
        """Routing is vLLM's, apart from this method."""
        return False

    def forward_oot(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The sum over the local experts, not yet over ranks.

        Args:
            layer: `w13_weight` `[E, 2I, H]` and `w2_weight` `[E, H, I]` of the E local experts, and which experts they are.
            x: `[N, H]`.
            topk_weights: `[N, K]`.
            topk_ids: `[N, K]`, ids among all experts.
            shared_experts: not used, the runner computes them.
            shared_experts_input: not used.

        Returns:
            `[N, H]`.

        Raises:
            ValueError: an activation other than SwiGLU, clamping, or biases.
        """
        if layer.activation != MoEActivation.SILU or layer.swiglu_limit is not None or self.moe.has_bias:
            raise ValueError(
                f"MoE layers with {layer.activation}, clamping or biases are not supported, only plain SwiGLU"
            )
        ids = topk_ids.long() if layer.expert_map is None else layer.expert_map[topk_ids.long()]  # -1: on another rank
        output = torch.zeros_like(x)
        w13, w2 = cast(Tensor, layer.w13_weight), cast(Tensor, layer.w2_weight)
        for expert in range(layer.local_num_experts):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            weight = topk_weights[token, slot, None].to(x.dtype)
            own = x[token] * weight if layer.apply_router_weight_on_input else x[token]
            gate, up = torch.nn.functional.linear(own, w13[expert]).chunk(2, dim=-1)
            done = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2[expert])
            output.index_add_(0, token, done if layer.apply_router_weight_on_input else done * weight)
        return output


def _choose(
    scores: Tensor, weights: Tensor, ids: Tensor, renormalize: bool, bias: Tensor | None, scale: float = 1.0
) -> None:
    """Write the K largest of `scores` `[N, E]` (with `bias` `[E]` for the choice alone) to `weights` and `ids` `[N, K]`."""
    chosen = (scores if bias is None else scores + bias).topk(ids.shape[-1], dim=-1).indices
    picked = scores.gather(-1, chosen)
    if renormalize:
        picked = picked / picked.sum(-1, keepdim=True)
    weights.copy_(picked * scale)
    ids.copy_(chosen)


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    bias: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """vLLM's operator of this name: softmax over experts, then the K best."""
    _choose(gating_output.float().softmax(-1), topk_weights, topk_ids, renormalize, bias)


def topk_sigmoid(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: Tensor | None = None,
) -> None:
    """vLLM's operator of this name: sigmoid of each expert, then the K best."""
    _choose(gating_output.float().sigmoid(), topk_weights, topk_ids, renormalize, bias, routed_scaling_factor)


_ARGUMENTS = "Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor token_expert_indices, Tensor gating_output, bool renormalize, Tensor? bias=None"


def register() -> Any:
    """Replace vLLM's method, and define the routing operators that its routers call and that an "empty" build lacks.

    Returns:
        What keeps the operators defined; the caller holds it.
    """
    UnquantizedFusedMoEMethod.register_oot(AscendUnquantizedFusedMoEMethod)
    library: Any = torch.library.Library("_moe_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"topk_softmax({_ARGUMENTS}, Tensor? is_padding=None) -> ()")
    library.define(f"topk_sigmoid({_ARGUMENTS}, float routed_scaling_factor=1.0, Tensor? is_padding=None) -> ()")
    library.impl("topk_softmax", topk_softmax, "CompositeExplicitAutograd")
    library.impl("topk_sigmoid", topk_sigmoid, "CompositeExplicitAutograd")
    return library
