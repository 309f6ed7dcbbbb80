# SPDX-License-Identifier: Apache-2.0
"""Routing by ascend-moe: among all experts (Mixtral, Qwen3-MoE), with a scale for each of them (Gemma 4), and among groups of them (DeepSeek-V2 and -V3, GLM4-MoE)."""

from __future__ import annotations

from ascend_moe import RoutingSpec, select_experts
from torch import Tensor, dtype

from vllm_ascend import compat

__all__ = ["fused_topk", "grouped_topk", "register", "scaled_topk"]


def fused_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    indices_type: dtype | None = None,
    scoring_func: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM's function of this name.

    Args:
        hidden_states: not used.
        gating_output: the router's logits `[T, E]`.
        topk: experts per token K.
        renormalize: divide a token's weights by their sum.
        indices_type: of the ids; None: int32.
        scoring_func: "softmax" or "sigmoid".

    Returns:
        weights float32 `[T, K]`, logical ids `[T, K]`, and the ids again, where vLLM has what no caller reads.

    Raises:
        ValueError: another scoring function, or more experts per token than experts.
    """
    spec = RoutingSpec(top_k=topk, scoring=scoring_func, renormalise=renormalize)  # type: ignore[arg-type]  # the spec checks it
    weights, ids = select_experts(gating_output, spec)
    ids = ids if indices_type is None else ids.to(indices_type)
    return weights, ids, ids


def grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """vLLM's function of this name. With a bias a group counts by its two best experts, without by its best one, as the models have it.

    Args:
        hidden_states: not used.
        gating_output: the router's logits `[T, E]`.
        topk: experts per token K.
        renormalize: divide a token's weights by their sum.
        num_expert_group: groups of the E experts; vLLM's router asks here with more experts than groups, which divide them.
        topk_group: groups a token may choose from.
        scoring_func: "softmax" or "sigmoid".
        routed_scaling_factor: of the weights, after renormalisation.
        e_score_correction_bias: `[E]`, added to the scores where experts are chosen.

    Returns:
        weights float32 `[T, K]` and logical ids int32 `[T, K]`.

    Raises:
        ValueError: another scoring function, or groups that do not fit.
    """
    spec = RoutingSpec(
        top_k=topk,
        scoring=scoring_func,  # type: ignore[arg-type]  # the spec checks it
        renormalise=renormalize,
        groups=num_expert_group,
        top_groups=topk_group,
        group_score="max" if e_score_correction_bias is None else "top2_sum",
        bias=e_score_correction_bias is not None,
        routed_scaling_factor=routed_scaling_factor,
    )
    return select_experts(gating_output, spec, e_score_correction_bias)


def scaled_topk(gating_output: Tensor, topk: int, per_expert_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gemma 4's routing.

    Args:
        gating_output: the router's logits `[T, E]`.
        topk: experts per token K.
        per_expert_scale: `[E]`, by which weights are multiplied once they add up to 1.

    Returns:
        weights float32 `[T, K]` and ids int32 `[T, K]`.
    """
    weights, ids = select_experts(gating_output, RoutingSpec(top_k=topk, scoring="softmax", renormalise=True))
    return weights * per_expert_scale.float().index_select(0, ids.flatten()).view_as(weights), ids


def register() -> None:
    """Let vLLM's routers call these."""
    compat.replace_gemma4_routing(scaled_topk)
    compat.replace_fused_topk(fused_topk)
    compat.replace_grouped_topk(grouped_topk)
