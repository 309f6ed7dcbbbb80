# SPDX-License-Identifier: Apache-2.0
"""vLLM's operators that choose experts, on ascend-moe's routing: its "empty" build does not have them."""

from __future__ import annotations

from typing import Any

import torch
from ascend_moe import RoutingSpec, select_experts
from torch import Tensor

__all__ = ["define", "topk_sigmoid", "topk_softmax"]


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
    spec = RoutingSpec(top_k=topk_ids.shape[-1], scoring="softmax", renormalise=renormalize, bias=bias is not None)
    _choose(topk_weights, topk_ids, gating_output, spec, bias)


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
    spec = RoutingSpec(
        top_k=topk_ids.shape[-1], scoring="sigmoid", renormalise=renormalize, bias=bias is not None,
        routed_scaling_factor=routed_scaling_factor,
    )  # fmt: skip
    _choose(topk_weights, topk_ids, gating_output, spec, bias)


def _choose(weights: Tensor, ids: Tensor, logits: Tensor, spec: RoutingSpec, bias: Tensor | None) -> None:
    """Write what ascend-moe selects of `logits` `[N, E]` to `weights` and `ids` `[N, K]`."""
    chosen_weights, chosen = select_experts(logits, spec, bias)
    weights.copy_(chosen_weights)
    ids.copy_(chosen)


_ARGUMENTS = "Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor token_expert_indices, Tensor gating_output, bool renormalize, Tensor? bias=None"


def define() -> Any:
    """Define the operators, which vLLM's routers call.

    Returns:
        What keeps them defined; the caller holds it.
    """
    library: Any = torch.library.Library("_moe_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"topk_softmax({_ARGUMENTS}, Tensor? is_padding=None) -> ()")
    library.define(f"topk_sigmoid({_ARGUMENTS}, float routed_scaling_factor=1.0, Tensor? is_padding=None) -> ()")
    library.impl("topk_softmax", topk_softmax, "CompositeExplicitAutograd")
    library.impl("topk_sigmoid", topk_sigmoid, "CompositeExplicitAutograd")
    return library
