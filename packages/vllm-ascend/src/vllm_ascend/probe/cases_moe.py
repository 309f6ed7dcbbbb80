# SPDX-License-Identifier: Apache-2.0
"""The kernels of `ascend_moe.kernels` that one rank can run: routing, permutation, grouped products and what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from ascend_moe import kernels
from torch import Tensor

from vllm_ascend.probe.cases_linear import dynamic_quant, dynamically_quantised, int8, positive
from vllm_ascend.probe.expected import FLOAT32, Case, Expected, exactly, random, unit

__all__ = ["cases"]

BF16 = torch.bfloat16
TOKENS, TOP_K, EXPERTS, HIDDEN = 8, 4, 64, 512
COUNTS = torch.tensor([5, 0, 17, 10])  # rows of four slots


def cases() -> Iterator[Callable[[], Case]]:
    """What builds each case."""
    yield lambda: _gating(sigmoid=False)
    yield lambda: _gating(sigmoid=True)
    yield lambda: _init_routing("all slots", 0, EXPERTS)
    yield lambda: _init_routing("a rank's 16 of 64 slots", 16, 32)
    yield _permute
    yield _unpermute
    yield _grouped
    yield _grouped_int32
    yield _grouped_dequantised
    yield lambda: _activation("swiglu", "32 rows of 2 x 256")
    yield lambda: _activation("clipped_swiglu", "32 rows of 2 x 256, GPT-OSS's constants")
    yield lambda: dynamic_quant("ascend_moe.dynamic_quant", kernels.dynamic_quant)
    yield _dequant_swiglu_quant


def _ids(experts: int = EXPERTS) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(TOKENS)]).int()


def _gating(*, sigmoid: bool) -> Case:
    groups, top_groups, scale = (8, 4, 2.5) if sigmoid else (1, 1, 1.0)

    def call(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.gating_top_k(
            logits, bias if sigmoid else None, top_k=TOP_K, sigmoid=sigmoid, groups=groups, top_groups=top_groups, by_two_best=sigmoid,
            scale=scale,
        )  # fmt: skip

    def expected(logits: Tensor, bias: Tensor) -> list[Expected]:
        scores = logits.double().sigmoid() if sigmoid else logits.double().softmax(-1)
        choice = scores + bias.double() if sigmoid else scores
        if sigmoid:
            grouped = choice.view(TOKENS, groups, -1)
            best = grouped.topk(2).values.sum(-1).topk(top_groups).indices
            closed = torch.ones(TOKENS, groups, dtype=torch.bool).scatter(1, best, False)
            choice = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)
        ids = choice.topk(TOP_K).indices
        weights = scores.gather(1, ids)
        weights = (weights / weights.sum(-1, keepdim=True) if sigmoid else weights) * scale
        relative = (EXPERTS + 16 + 4 * logits.double().abs().max()) * FLOAT32  # of exp, and of a sum over all experts
        return [Expected(value=weights, allowed=weights * relative), exactly(ids)]

    inputs = random(TOKENS, EXPERTS, dtype=torch.float32), random(EXPERTS, dtype=torch.float32, seed=1, scale=0.1)
    shape = "sigmoid, 4 of 8 groups, bias" if sigmoid else "softmax, 4 of 64 experts"
    return Case(kernel="ascend_moe.gating_top_k", shape=shape, inputs=inputs, call=call, expected=expected)


def _sorted(x: Tensor, ids: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by slot first..last-1, the row of each id (-1: another rank's), rows of each slot."""
    flat = ids.flatten().long()
    order = [place for slot in range(first, last) for place in (flat == slot).nonzero().flatten().tolist()]
    index = torch.full((flat.numel(),), -1, dtype=torch.int32)
    index[order] = torch.arange(len(order), dtype=torch.int32)
    counts = torch.bincount(flat, minlength=last)[first:last]
    return x[torch.tensor(order, dtype=torch.long) // ids.shape[1]], index, counts


def _init_routing(shape: str, first: int, last: int) -> Case:
    def call(x: Tensor, ids: Tensor) -> list[Tensor]:
        routed = kernels.init_routing(
            x, ids, rows=ids.numel(), num_slots=EXPERTS + 1, first=first, last=last, quantise=False
        )
        return [routed.rows, routed.row_index, routed.counts]

    def expected(x: Tensor, ids: Tensor) -> list[Expected]:
        rows, index, counts = _sorted(x, ids, first, last)
        whole = torch.zeros(ids.numel(), x.shape[1], dtype=x.dtype)
        whole[: len(rows)] = rows
        written = (torch.arange(ids.numel()) < len(rows))[:, None].expand(whole.shape)
        return [exactly(whole, written), exactly(index), exactly(counts)]

    return Case(
        kernel="ascend_moe.init_routing",
        shape=shape,
        inputs=(random(TOKENS, HIDDEN), _ids()),
        call=call,
        expected=expected,
    )


def _permute() -> Case:
    def expected(x: Tensor, ids: Tensor) -> list[Expected]:
        rows, index, _ = _sorted(x, ids, 0, EXPERTS)
        return [exactly(rows), exactly(index)]

    return Case(
        kernel="ascend_moe.permute", shape="8 tokens, 4 of 64 experts", inputs=(random(TOKENS, HIDDEN), _ids()), call=kernels.permute,
        expected=expected,
    )  # fmt: skip


def _unpermute() -> Case:
    def expected(rows: Tensor, index: Tensor, weights: Tensor) -> list[Expected]:
        parts = rows.double()[index.long()].view(TOKENS, TOP_K, -1) * weights.double()[..., None]
        value, of_one = parts.sum(1), unit(rows.dtype)
        allowed = parts.abs().sum(1) * ((TOP_K + 1) * of_one + TOP_K * FLOAT32)  # the sum may be rounded at each term
        return [Expected(value=value, allowed=allowed)]

    index = torch.randperm(TOKENS * TOP_K, generator=torch.Generator().manual_seed(2)).int()
    inputs = random(TOKENS * TOP_K, HIDDEN), index, random(TOKENS, TOP_K, seed=1).abs()
    return Case(
        kernel="ascend_moe.unpermute", shape="8 tokens, sums of 4 weighted rows", inputs=inputs,
        call=lambda rows, index, weights: [kernels.unpermute(rows, index, weights)], expected=expected,
    )  # fmt: skip


def _by_slot(rows: Tensor, weights: Tensor) -> Tensor:
    parts = zip(torch.split(rows, COUNTS.tolist()), weights, strict=True)
    return torch.cat([part @ weight for part, weight in parts])


def _grouped() -> Case:
    def expected(rows: Tensor, weights: Tensor, counts: Tensor) -> list[Expected]:
        value = _by_slot(rows.double(), weights.double())
        sizes = _by_slot(rows.double().abs(), weights.double().abs())
        return [Expected(value=value, allowed=value.abs() * unit(rows.dtype) + sizes * (HIDDEN + 4) * FLOAT32)]

    inputs = random(32, HIDDEN), random(4, HIDDEN, 256, seed=1), COUNTS
    return Case(
        kernel="ascend_moe.grouped_matmul", shape="32 rows in 4 slots, 512 x 256", inputs=inputs,
        call=lambda *given: [kernels.grouped_matmul(*given)], expected=expected,
    )  # fmt: skip


def _grouped_int32() -> Case:
    inputs = int8(32, HIDDEN), int8(4, HIDDEN, 256, seed=1), COUNTS
    return Case(
        kernel="ascend_moe.grouped_matmul_int32", shape="32 rows in 4 slots, 512 x 256", inputs=inputs,
        call=lambda *given: [kernels.grouped_matmul_int32(*given)],
        expected=lambda rows, weights, counts: [exactly(_by_slot(rows.long(), weights.long()))],
    )  # fmt: skip


def _grouped_dequantised() -> Case:
    def call(rows: Tensor, weights: Tensor, counts: Tensor, scale: Tensor, row_scale: Tensor) -> list[Tensor]:
        return [
            kernels.grouped_matmul_dequantised(
                rows, weights, counts, weight_scale=scale, row_scale=row_scale, dtype=BF16
            )
        ]

    def expected(rows: Tensor, weights: Tensor, counts: Tensor, scale: Tensor, row_scale: Tensor) -> list[Expected]:
        value = _by_slot(rows.long(), weights.long()).double() * row_scale.double()[:, None]
        value = value * scale.double().repeat_interleave(counts, 0)
        return [Expected(value=value, allowed=value.abs() * (unit(BF16) + 6 * FLOAT32))]

    inputs = int8(32, HIDDEN), int8(4, HIDDEN, 256, seed=1), COUNTS, positive(4, 256, dtype=BF16), positive(32, seed=1)
    return Case(
        kernel="ascend_moe.grouped_matmul_dequantised",
        shape="32 rows in 4 slots, 512 x 256",
        inputs=inputs,
        call=call,
        expected=expected,
    )


def _activation(name: str, shape: str) -> Case:
    limit, alpha = (7.0, 1.702) if name == "clipped_swiglu" else (torch.inf, 1.0)

    def call(x: Tensor) -> list[Tensor]:
        if name == "swiglu":
            return [kernels.swiglu(x)]
        return [kernels.clipped_swiglu(x, limit=limit, alpha=alpha, up_bias=1.0, interleaved=True)]

    def expected(x: Tensor) -> list[Expected]:
        gate, up = x.double().chunk(2, -1) if name == "swiglu" else (x.double()[:, ::2], x.double()[:, 1::2])
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        more = 0.0 if name == "swiglu" else 1.0
        y = gate * (alpha * gate).sigmoid() * (up + more)
        size = gate.abs() * (alpha * gate).sigmoid() * (up.abs() + more)  # up + 1 may cancel
        return [Expected(value=y, allowed=size * (3 * unit(x.dtype) + (12 + 4 * alpha * gate.abs()) * FLOAT32))]

    return Case(
        kernel=f"ascend_moe.{name}", shape=shape, inputs=[random(32, 512, scale=3.0)], call=call, expected=expected
    )


def _dequant_swiglu_quant() -> Case:
    def expected(x: Tensor, scale: Tensor, row_scale: Tensor, counts: Tensor) -> list[Expected]:
        y = x.double() * scale.double().repeat_interleave(counts, 0) * row_scale.double()[:, None]
        gate, up = y.chunk(2, -1)
        y = gate * gate.sigmoid() * up
        return dynamically_quantised(y, y.abs() * (16 + 8 * gate.abs()) * FLOAT32)

    x = torch.randint(-20000, 20000, (32, 512), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    inputs = x, positive(4, 512), positive(32, seed=1), COUNTS
    return Case(
        kernel="ascend_moe.dequant_swiglu_quant", shape="32 rows of 2 x 256 in 4 slots", inputs=inputs, call=kernels.dequant_swiglu_quant,
        expected=expected,
    )  # fmt: skip
