# SPDX-License-Identifier: Apache-2.0
"""The kernels of `vllm_ascend.kernels`: norms, activation, rotary embedding, the split of a projection, top-k; and the write to the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vllm_ascend import kernels
from vllm_ascend.attention.kernels import scatter_kv
from vllm_ascend.probe.expected import FLOAT32, Case, Expected, exactly, random, unit

__all__ = ["cases"]

EPSILON = 1e-6
BF16 = torch.bfloat16


def cases() -> Iterator[Callable[[], Case]]:
    """What builds each case."""
    yield lambda: _rms_norm("8 tokens of 4096", 8, 4096)
    yield lambda: _rms_norm("heads of 128", 8, 32, 128)
    yield _add_rms_norm
    yield _swiglu
    yield _split_columns
    yield _in_fractal_nz
    for size in (64, 128):
        yield lambda size=size: _apply_rotary(size)  # type: ignore[misc]
    for interleaved in (False, True):
        yield lambda interleaved=interleaved: _rotary_mul(interleaved)  # type: ignore[misc]
    yield _scatter_kv
    yield _top_k_top_p


def _normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def _rms_norm(shape: str, *sizes: int) -> Case:
    def expected(x: Tensor, weight: Tensor) -> list[Expected]:
        y = _normalised(x.double(), weight.double())
        return [Expected(value=y, allowed=y.abs() * (3 * unit(x.dtype) + (x.shape[-1] + 8) * FLOAT32))]

    inputs = random(*sizes), random(sizes[-1], seed=1)
    return Case(
        kernel="vllm_ascend.rms_norm", shape=shape, inputs=inputs,
        call=lambda x, weight: [kernels.rms_norm(x, weight, EPSILON)], expected=expected,
    )  # fmt: skip


def _add_rms_norm() -> Case:
    def expected(x: Tensor, residual: Tensor, weight: Tensor) -> list[Expected]:
        total = x.double() + residual.double()
        y, of_one = _normalised(total, weight.double()), unit(x.dtype)
        return [  # the norm may be of the rounded sum
            Expected(value=y, allowed=y.abs() * (6 * of_one + (x.shape[-1] + 8) * FLOAT32)),
            Expected(value=total, allowed=total.abs() * (of_one + FLOAT32)),
        ]

    inputs = random(8, 4096), random(8, 4096, seed=1), random(4096, seed=2)
    return Case(
        kernel="vllm_ascend.add_rms_norm", shape="8 tokens of 4096", inputs=inputs,
        call=lambda x, residual, weight: kernels.add_rms_norm(x, residual, weight, EPSILON), expected=expected,
    )  # fmt: skip


def _swiglu() -> Case:
    def expected(x: Tensor) -> list[Expected]:
        gate, up = x.double().chunk(2, -1)
        y = gate * gate.sigmoid() * up
        return [Expected(value=y, allowed=y.abs() * (3 * unit(x.dtype) + (8 + 4 * gate.abs()) * FLOAT32))]

    return Case(
        kernel="vllm_ascend.swiglu", shape="8 tokens of 2 x 5504", inputs=[random(8, 2 * 5504)],
        call=lambda x: [kernels.swiglu(x)], expected=expected,
    )  # fmt: skip


def _split_columns() -> Case:
    widths = [4096, 1024, 1024]
    return Case(
        kernel="vllm_ascend.split_columns", shape="query, key and value of 32 and 8 heads", inputs=[random(8, sum(widths))],
        call=lambda x: kernels.split_columns(x, widths), expected=lambda x: [exactly(part) for part in x.split(widths, -1)],
    )  # fmt: skip


def _in_fractal_nz() -> Case:
    weight = torch.arange(96 * 64, dtype=torch.int32).remainder(251).sub(125).to(torch.int8).view(96, 64)
    return Case(
        kernel="vllm_ascend.in_fractal_nz", shape="int8 of 96 x 64", inputs=[weight], call=lambda x: [kernels.in_fractal_nz(x)],
        expected=lambda x: [exactly(x)],
    )  # fmt: skip


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Expected:
    x, cos, sin, of_one = x.double(), cos.double(), sin.double(), unit(x.dtype)
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
    parts = (x * cos).abs() + (turned * sin).abs()
    return Expected(value=x * cos + turned * sin, allowed=parts * (3 * of_one + 4 * FLOAT32))


def _angles(size: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(1.0, 9)[:, None, None] * torch.arange(1.0, size + 1) / size
    return angle.cos().to(BF16), angle.sin().to(BF16)


def _apply_rotary(size: int) -> Case:
    inputs = random(8, 32, size), random(8, 8, size, seed=1), *_angles(size)
    return Case(
        kernel="vllm_ascend.apply_rotary", shape=f"32 and 8 heads of {size}", inputs=inputs, call=kernels.apply_rotary,
        expected=lambda q, k, cos, sin: [_rotated(q, cos, sin, False), _rotated(k, cos, sin, False)],
    )  # fmt: skip


def _rotary_mul(interleaved: bool) -> Case:
    cos, sin = (x[None] for x in _angles(64))
    return Case(
        kernel="vllm_ascend.rotary_mul", shape=f"32 heads of 64, {'even and odd' if interleaved else 'halves'}",
        inputs=(random(1, 8, 32, 64), cos, sin),
        call=lambda x, cos, sin: [kernels.rotary_mul(x, cos, sin, interleaved)],
        expected=lambda x, cos, sin: [_rotated(x, cos, sin, interleaved)],
    )  # fmt: skip


def _scatter_kv() -> Case:
    slots = torch.tensor([130, 5, 257, 0, 511, 131, 300, 4])

    def call(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> list[Tensor]:
        scatter_kv(key, value, keys, values, slots)
        return [keys, values]

    def expected(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> list[Expected]:
        caches = []
        for rows, cache in ((key, keys), (value, values)):
            wanted = cache.clone()
            wanted.view(-1, *rows.shape[1:])[slots] = rows
            caches.append(exactly(wanted))
        return caches

    inputs = (
        random(8, 8, 128),
        random(8, 8, 128, seed=1),
        random(4, 128, 8, 128, seed=2),
        random(4, 128, 8, 128, seed=3),
        slots,
    )
    return Case(
        kernel="vllm_ascend.scatter_kv",
        shape="8 tokens into 4 blocks of 128, 8 heads of 128",
        inputs=inputs,
        call=call,
        expected=expected,
    )


def _top_k_top_p() -> Case:
    """Each logit of a row is twice as likely as the next, in some order, so that no sum of probabilities is near p."""
    rows, vocabulary, lowest = 8, 32000, -1e5
    orders = torch.stack([random(vocabulary, seed=row).float().argsort() for row in range(rows)])
    k = torch.tensor([1, 2, 3, 4, 20, 20, 1024, 1024], dtype=torch.int32)
    p = torch.tensor([1.0, 1.0, 0.6, 0.2, 0.9, 0.99, 0.99, 0.5])

    def expected(logits: Tensor, k: Tensor, p: Tensor) -> list[Expected]:
        sorted_logits, order = logits.double().sort(descending=True)
        places = torch.arange(vocabulary)
        sorted_logits[places >= k.unsqueeze(1)] = -torch.inf
        chances = sorted_logits.softmax(-1)
        kept = (places < k.unsqueeze(1)) & (chances.cumsum(-1) - chances < p.unsqueeze(1))
        return [exactly(torch.where(torch.zeros_like(kept).scatter(1, order, kept), logits.double(), lowest))]

    return Case(
        kernel="vllm_ascend.top_k_top_p", shape="8 rows of a vocabulary of 32000", inputs=[orders * -math.log(2), k, p],
        call=lambda logits, k, p: [kernels.top_k_top_p(logits, k, p).clamp(min=lowest)], expected=expected,
    )  # fmt: skip
