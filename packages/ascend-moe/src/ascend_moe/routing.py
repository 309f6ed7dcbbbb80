# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, and with which weight: `RoutingSpec` and `select_experts`.

On an NPU one kernel computes both where there is one for the spec (`_kernel_routes`); otherwise plain torch does.

Legend: T tokens, E logical experts, G groups of experts, K experts per token (top k), P rows of a routing table.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ascend_moe import kernels

__all__ = ["GroupScore", "RoutingSpec", "Scoring", "select_experts", "to_physical"]

Scoring: TypeAlias = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScore: TypeAlias = Literal["top2_sum", "max"]

_EPSILON = 1e-20  # so that a token whose scores all underflow to 0 is not divided by 0; too small to change any other float32 sum


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSpec:
    """How a model routes its tokens. The number of experts is not here: it is the logits' last axis.

    Args:
        top_k: experts per token.
        scoring: the function from logits to scores. The vLLM plugin does not use `sqrtsoftplus` (DeepSeek-V4).
        renormalise: divide the weights of a token by their sum.
        groups: groups of equally many consecutive experts. 1: ungrouped.
        top_groups: groups a token may choose its experts from.
        group_score: how a group is scored: the sum of its two best experts (DeepSeek-V3, GLM4-MoE) or its best
            (DeepSeek-V2). It must be given where top_groups < groups, and has no effect otherwise.
        bias: whether a bias (`e_score_correction_bias`) is added to the scores for the choice of experts. It is never in the weights.
        routed_scaling_factor: multiplies the weights once, after renormalisation. A model layer that routes with this
            factor must not scale its output again.

    Raises:
        ValueError: a value outside of what its argument allows.
    """

    top_k: int
    scoring: Scoring
    renormalise: bool
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore | None = None
    bias: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        """Check all that does not depend on the number of experts."""
        for name, value in (("top_k", self.top_k), ("groups", self.groups), ("top_groups", self.top_groups)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.scoring not in get_args(Scoring):
            raise ValueError(f"scoring={self.scoring!r} must be one of {', '.join(get_args(Scoring))}")
        if self.group_score is not None and self.group_score not in get_args(GroupScore):
            raise ValueError(
                f"group_score={self.group_score!r} must be one of {', '.join(get_args(GroupScore))} or None"
            )
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups={self.top_groups} must be at most groups={self.groups}")
        if self.limits_groups and self.group_score is None:
            raise ValueError(
                f"group_score=None must be one of {', '.join(get_args(GroupScore))} where top_groups={self.top_groups} "
                f"is less than groups={self.groups}"
            )
        if not (math.isfinite(self.routed_scaling_factor) and self.routed_scaling_factor > 0):
            raise ValueError(f"routed_scaling_factor={self.routed_scaling_factor} must be finite and above 0")

    @property
    def limits_groups(self) -> bool:
        """Whether a token may choose from some groups only."""
        return self.top_groups < self.groups

    def check_experts(self, num_experts: int) -> None:
        """Check that the spec fits a layer of `num_experts` logical experts.

        Raises:
            ValueError: the groups do not divide the experts, or a token may choose from fewer experts than `top_k`.
        """
        if num_experts % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {num_experts} experts")
        per_group = num_experts // self.groups
        if self.limits_groups and self.group_score == "top2_sum" and per_group < 2:
            raise ValueError(f"groups={self.groups} of {num_experts} experts must hold at least 2 each for 'top2_sum'")
        if self.top_k > per_group * self.top_groups:
            raise ValueError(
                f"top_k={self.top_k} must be at most {per_group * self.top_groups}: the experts in "
                f"top_groups={self.top_groups} of groups={self.groups}, {per_group} each"
            )


def select_experts(
    logits: Tensor,
    spec: RoutingSpec,
    bias: Tensor | None = None,
    *,
    log2phy: Tensor | None = None,
    routing_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token.

    Scores are computed in float32 whatever the logits' dtype. Experts are chosen by score plus bias, in descending
    order of that sum; ties are broken as `torch.topk` breaks them, as in the models' own code. Weights are the scores
    without bias, renormalised, then scaled once. Values are not checked, so that the host does not wait for the device:
    NaN logits, or a map with slots that do not exist, give undefined results and no error.

    This function and `to_physical` are the only places where logical ids become physical ones. Where every rank routes
    all tokens (all-gather), all ranks must choose the same replica of an expert: pass a `routing_table`, or the same
    `log2phy` on all ranks.

    Args:
        logits: the router's output, float `[T, E]`.
        spec: how to route.
        bias: float `[E]` if `spec.bias`, otherwise None.
        log2phy: int32 `[E]`, the physical slot that serves each logical expert.
        routing_table: int32 `[P, E]`, the same by token: the token at position t uses row `t % P`.

    Returns:
        weights float32 `[T, K]` and ids int32 `[T, K]`: physical slots where a map is given, else logical experts.

    Raises:
        ValueError: a wrong shape, dtype or device, two maps, a bias without `spec.bias`, `spec.bias` without a bias, or
            a spec that does not fit E.

    Source: the routers of Mixtral, Qwen3-MoE, DeepSeek-V2, -V3, -V4 and GLM4-MoE in Hugging Face transformers.
    """
    _check_inputs(logits, spec, bias)
    _check_maps(log2phy, routing_table, logits.shape[1], logits.device)

    choose = _by_kernel if _kernel_routes(logits, spec) else _by_operators
    weights_TK, ids_TK = choose(logits.float(), spec, None if bias is None else bias.float())
    return weights_TK, to_physical(ids_TK, log2phy=log2phy, routing_table=routing_table)


def to_physical(ids: Tensor, *, log2phy: Tensor | None = None, routing_table: Tensor | None = None) -> Tensor:
    """The physical slots of chosen experts, for a router outside of this package. `select_experts` includes this step.

    Args:
        ids: int32 or int64 `[T, K]`, logical experts in 0..E-1.
        log2phy: as in `select_experts`.
        routing_table: as in `select_experts`.

    Returns:
        int32 `[T, K]`; without a map the ids themselves.

    Raises:
        ValueError: two maps, or one of a wrong shape or dtype.
    """
    given = log2phy if log2phy is not None else routing_table
    if given is not None:
        _check_maps(log2phy, routing_table, given.shape[-1], ids.device)
    if log2phy is not None:
        return log2phy[ids.long()]
    if routing_table is not None:
        rows_T = torch.arange(ids.shape[0], device=ids.device) % routing_table.shape[0]
        return routing_table[rows_T.unsqueeze(1), ids.long()]
    return ids.to(torch.int32)


def _kernel_routes(logits: Tensor, spec: RoutingSpec) -> bool:
    """Whether one NPU kernel computes all of it. The limits are from the kernel's documentation."""
    tokens, num_experts = logits.shape
    if logits.device.type != "npu" or not tokens or spec.scoring == "sqrtsoftplus":
        return False
    if spec.scoring == "sigmoid" and not spec.renormalise:  # with sigmoid the kernel always renormalises
        return False
    groups = spec.groups if spec.limits_groups else 1
    per_group = num_experts // groups
    return per_group > 2 and groups * 32 * -(-per_group // 32) <= 2048


def _by_kernel(logits_TE: Tensor, spec: RoutingSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and ids by the kernel; softmax scores are renormalised after it."""
    softmax_sums = spec.scoring == "softmax" and spec.renormalise
    weights_TK, ids_TK = kernels.gating_top_k(
        logits_TE,
        bias,
        top_k=spec.top_k,
        sigmoid=spec.scoring == "sigmoid",
        groups=spec.groups if spec.limits_groups else 1,
        top_groups=spec.top_groups if spec.limits_groups else 1,
        by_two_best=spec.group_score == "top2_sum",
        scale=1.0 if softmax_sums else spec.routed_scaling_factor,
    )
    return (_normalised(weights_TK, spec) if softmax_sums else weights_TK), ids_TK


def _by_operators(logits_TE: Tensor, spec: RoutingSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and ids in plain torch."""
    scores_TE = _scores(logits_TE, spec.scoring)
    choice_TE = scores_TE if bias is None else scores_TE + bias
    if spec.limits_groups:
        choice_TE = _close_groups(choice_TE, spec)
    ids_TK = choice_TE.topk(spec.top_k, dim=-1).indices
    return _normalised(scores_TE.gather(1, ids_TK), spec), ids_TK


def _normalised(weights_TK: Tensor, spec: RoutingSpec) -> Tensor:
    """The weights of chosen experts, renormalised and scaled as the spec says."""
    if spec.renormalise:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        if spec.scoring != "softmax":  # whose largest score is at least 1 / E, beside which the epsilon is nothing
            total_T1 = total_T1 + _EPSILON
        weights_TK = weights_TK / total_T1
    if spec.routed_scaling_factor != 1.0:
        weights_TK = weights_TK * spec.routed_scaling_factor
    return weights_TK


def _scores(logits_TE: Tensor, scoring: Scoring) -> Tensor:
    """Float32 `[T, E]`: the scores of float32 logits."""
    if scoring == "softmax":
        return logits_TE.softmax(dim=-1)
    if scoring == "sigmoid":
        return logits_TE.sigmoid()
    return functional.softplus(logits_TE).sqrt()


def _close_groups(choice_TE: Tensor, spec: RoutingSpec) -> Tensor:
    """`choice_TE` with -inf in all but the best `spec.top_groups` groups of each token.

    -inf and not 0: a biased score may be below 0, and an expert of a closed group would then be chosen before it.
    """
    tokens, num_experts = choice_TE.shape
    choice_TGe = choice_TE.reshape(tokens, spec.groups, num_experts // spec.groups)
    if spec.group_score == "top2_sum":
        group_TG = choice_TGe.topk(2, dim=-1).values.sum(dim=-1)
    else:
        group_TG = choice_TGe.amax(dim=-1)
    open_ids = group_TG.topk(spec.top_groups, dim=-1).indices
    closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, open_ids, False)
    return choice_TGe.masked_fill(closed_TG.unsqueeze(-1), -math.inf).reshape(tokens, num_experts)


def _check_inputs(logits: Tensor, spec: RoutingSpec, bias: Tensor | None) -> None:
    """Raise ValueError unless the logits are a float matrix that the spec fits, and the bias is given exactly if `spec.bias`."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits of {_describe(logits)} must be a float tensor [tokens, experts]")
    num_experts = logits.shape[1]
    spec.check_experts(num_experts)
    if not spec.bias:
        if bias is not None:
            raise ValueError(f"bias of {_describe(bias)} must be None where spec.bias=False")
        return
    wanted = f"a float tensor [{num_experts}] on {logits.device} where spec.bias=True"
    if bias is None:
        raise ValueError(f"bias=None must be {wanted}")
    if bias.shape != (num_experts,) or not bias.is_floating_point() or bias.device != logits.device:
        raise ValueError(f"bias of {_describe(bias)} must be {wanted}")


def _check_maps(log2phy: Tensor | None, routing_table: Tensor | None, num_experts: int, device: torch.device) -> None:
    """Raise ValueError unless at most one map is given, and it fits."""
    if log2phy is not None and routing_table is not None:
        raise ValueError(
            f"log2phy of {_describe(log2phy)} must be None where routing_table is given: only one map can be applied"
        )
    for name, given, axes in (("log2phy", log2phy, 1), ("routing_table", routing_table, 2)):
        if given is None:
            continue
        shape = f"[{num_experts}]" if axes == 1 else f"[1 row or more, {num_experts}]"
        fits = given.dim() == axes and given.shape[-1] == num_experts and given.shape[0] > 0
        if not fits or given.dtype != torch.int32 or given.device != device:
            raise ValueError(f"{name} of {_describe(given)} must be torch.int32 {shape} on {device}")


def _describe(tensor: Tensor) -> str:
    """Dtype, shape and device of a tensor, for error messages."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
