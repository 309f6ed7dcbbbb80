# SPDX-License-Identifier: Apache-2.0
"""Every NPU kernel that ascend-moe calls, imported on first use. The only file of this package that names torch_npu.

Legend: T tokens, K experts per token, H hidden, I intermediate, L slots of this rank, A rows sorted by slot. Where an input
has no rows, no kernel is launched, and the empty result is made here.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "RoutedRows",
    "SentRows",
    "clipped_swiglu",
    "dequant_swiglu_quant",
    "dynamic_quant",
    "gating_top_k",
    "grouped_matmul",
    "grouped_matmul_dequantised",
    "grouped_matmul_int32",
    "init_routing",
    "mc2_combine",
    "mc2_dispatch",
    "permute",
    "swiglu",
    "unpermute",
]

_COUNTS = 1  # group_list_type and expert_tokens_num_type: rows of each group, not where it ends
_CUMULATIVE = 0  # group_list_type: where each group ends


def _npu() -> Any:
    """Import torch_npu. RuntimeError, with the command that installs it, where it is missing."""
    try:
        return import_module("torch_npu")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "mixture-of-experts kernels need torch_npu: pip install torch-npu==2.13.0 (without an NPU: ascend-sim)"
        ) from error


def gating_top_k(
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    sigmoid: bool,
    groups: int,
    top_groups: int,
    by_two_best: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Weights float32 `[T, K]` and ids int32 `[T, K]` of float32 logits `[T, E]`, T > 0, and bias `[E]`.

    Sigmoid scores are divided by their sum over the chosen experts, softmax scores are not; then both are multiplied by `scale`.
    """
    weights, ids, _ = _npu().npu_moe_gating_top_k(
        logits,
        top_k,
        bias=bias,
        k_group=top_groups,
        group_count=groups,
        group_select_mode=1 if by_two_best else 0,
        renorm=0,
        norm_type=1 if sigmoid else 0,
        routed_scaling_factor=scale,
        eps=1e-20,
    )
    return weights, ids


class RoutedRows(NamedTuple):
    """What `init_routing` returns."""

    rows: Tensor
    row_index: Tensor
    counts: Tensor
    scales: Tensor


class SentRows(NamedTuple):
    """What `mc2_dispatch` returns. `assist`, `received` and `expand_scales` are inputs of `mc2_combine`; their contents differ between chips."""

    rows: Tensor
    scales: Tensor
    assist: Tensor
    counts: Tensor
    received: Tensor
    expand_scales: Tensor


def init_routing(
    x: Tensor,
    ids: Tensor,
    scales: Tensor | None = None,
    *,
    rows: int,
    num_slots: int,
    first: int,
    last: int,
    quantise: bool,
) -> RoutedRows:
    """Copy each token once for each of its slots in first..last-1, sorted by slot.

    Args:
        x: `[T, H]`, T > 0.
        ids: int32 `[T, K]`, values in 0..num_slots-1.
        scales: float32 `[T]` where x is int8; they are copied with their rows.
        rows: A, at most T * K and at least the number of copies.
        num_slots: slots of all ranks.
        first, last: the slots of this rank, first..last-1.
        quantise: turn the rows into int8, each with its own scale.

    Returns:
        rows `[A, H]`, of which the first `counts.sum()` are written; row_index int32 `[T * K]`: the row of token t's
        j-th expert at `t * K + j`, -1 where its slot is elsewhere; counts int64 `[last - first]`; scales float32 `[A]`,
        written where `quantise` or where `scales` was given.
    """
    found = _npu().npu_moe_init_routing_v2(
        x,
        ids,
        scale=scales,
        active_num=rows,
        expert_num=num_slots,
        expert_tokens_num_type=_COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[first, last],
        quant_mode=1 if quantise else -1,
    )
    return RoutedRows(*found)


def permute(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Copy each token once for each of its ids, sorted by id; equal ids keep the tokens' order.

    Args:
        x: `[T, H]`.
        ids: int32 or int64 `[T, K]` or `[T]`.

    Returns:
        rows `[T * K, H]`; index int32 `[T * K]`: the row of token t's j-th id at `t * K + j`.
    """
    if not ids.numel():
        return x.new_empty((0, x.shape[1])), ids.new_empty(0, dtype=torch.int32)
    rows, index = _npu().npu_moe_token_permute(tokens=x, indices=ids, num_out_tokens=ids.numel())
    return rows, index


def unpermute(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """The inverse of `permute`: rows `[A, H]` back in the order of index `[T * K]`.

    With weights `[T, K]` (of the rows' dtype) the K rows of a token are multiplied by them and summed: `[T, H]`.
    """
    if not index.numel():
        return rows.new_empty((0, rows.shape[1]))
    result: Tensor = _npu().npu_moe_token_unpermute(permuted_tokens=rows, sorted_indices=index, probs=weights)
    return result


def grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the rows of slot l by `weights[l]`: rows `[A, n]`, weights `[L, n, m]`, counts int64 `[L]` -> `[A, m]`.

    With a bias `[L, m]`, row l of it is added; it is float32 for bfloat16 rows, else of the rows' dtype. Rows of the result from `counts.sum()` on are not written: they hold anything, and are not to be read.
    """
    return _grouped(rows, weights, counts) if bias is None else _grouped(rows, weights, counts, bias=[bias])


def grouped_matmul_int32(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """`grouped_matmul` of int8 by int8; the result is the int32 sum."""
    return _grouped(rows, weights, counts, output_dtype=torch.int32)


def grouped_matmul_dequantised(
    rows: Tensor, weights: Tensor, counts: Tensor, *, weight_scale: Tensor, row_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`grouped_matmul` of int8 by int8, times weight_scale `[L, m]` and row_scale float32 `[A]`, as `dtype`.

    weight_scale is bfloat16 for a bfloat16 result, else float32.
    """
    return _grouped(rows, weights, counts, scale=[weight_scale], per_token_scale=[row_scale], output_dtype=dtype)


def _grouped(rows: Tensor, weights: Tensor, counts: Tensor, **options: Any) -> Tensor:
    # The kernel takes no list of a single count. A single count is where its group ends as well, and so a list of cumulative counts.
    # Its documentation wants the groups to hold all rows. Rows after the last group are not computed; nothing reads what lies there.
    kind = _COUNTS if len(counts) > 1 else _CUMULATIVE
    result: Tensor = _npu().npu_grouped_matmul(
        x=[rows],
        weight=[weights],
        split_item=2,
        group_list_type=kind,
        group_type=0,
        group_list=counts,
        **options,
    )[0]
    return result


def swiglu(x: Tensor) -> Tensor:
    """`silu(x[..., :I]) * x[..., I:]`; x `[A, 2I]`."""
    result: Tensor = _npu().npu_swiglu(x)
    return result


def clipped_swiglu(x: Tensor, *, limit: float, alpha: float, up_bias: float, interleaved: bool) -> Tensor:
    """`g * sigmoid(alpha * g) * (u + up_bias)`, after g was clipped to at most `limit` and u to -limit .. limit; x `[A, 2I]`.

    Interleaved: g is the even columns and u the odd ones; otherwise g is the left half and u the right one.
    """
    result: Tensor = _npu().npu_clipped_swiglu(x, alpha=alpha, limit=limit, bias=up_bias, interleaved=interleaved)
    return result


def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their float32 scales `[A]`, `max |row| / 127`; x `[A, H]`."""
    if not len(x):
        return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
    rows, scales = _npu().npu_dynamic_quant(x)
    return rows, scales


def dequant_swiglu_quant(x: Tensor, weight_scale: Tensor, row_scale: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`dynamic_quant(swiglu(x * weight_scale[slot] * row_scale))` in one kernel.

    Args:
        x: int32 `[A, 2I]`.
        weight_scale: float32 `[L, 2I]`.
        row_scale: float32 `[A]`.
        counts: int64 `[L]`; rows from their sum on are not written.

    Returns:
        int8 `[A, I]` and float32 `[A]`.
    """
    rows, scales = _npu().npu_dequant_swiglu_quant(
        x,
        weight_scale=weight_scale,
        activation_scale=row_scale,
        group_index=counts,
        activate_left=True,
        quant_mode=1,
    )
    return rows, scales


def mc2_dispatch(x: Tensor, ids: Tensor, group: dict[str, Any], *, quantise: bool, **options: Any) -> SentRows:
    """Send each token to the ranks of its slots, quantised before it is sent if `quantise`.

    Args:
        x: `[T, H]`, T > 0 and the same on all ranks.
        ids: int32 `[T, K]`.
        group: the arguments that describe ranks and slots, the same for `mc2_combine`.
        quantise: send int8 rows and their scales.
        options: `x_active_mask` bool `[T]`, True before False; on A2 `expert_scales` float32 `[T, K]`.
    """
    found = _npu().npu_moe_distribute_dispatch_v2(
        x=x, expert_ids=ids, quant_mode=2 if quantise else 0, expert_token_nums_type=_COUNTS, **group, **options
    )
    rows, scales, assist, counts, received, _, expand_scales = found
    return SentRows(rows, scales, assist, counts, received, expand_scales)


def mc2_combine(
    rows: Tensor, ids: Tensor, weights: Tensor, sent: SentRows, group: dict[str, Any], **options: Any
) -> Tensor:
    """Send rows back and sum the K of a token by float32 weights `[T, K]`: `[T, H]`. See `mc2_dispatch`."""
    result: Tensor = _npu().npu_moe_distribute_combine_v2(
        expand_x=rows,
        expert_ids=ids,
        assist_info_for_combine=sent.assist,
        ep_send_counts=sent.received,
        expert_scales=weights,
        **group,
        **options,
    )
    return result
