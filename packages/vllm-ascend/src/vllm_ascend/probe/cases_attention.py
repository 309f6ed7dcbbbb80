# SPDX-License-Identifier: Apache-2.0
"""The attention kernels of `vllm_ascend.kernels`, as the backends call them: paged decoding and prompts, a window, encoders, latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_ascend import kernels
from vllm_ascend.probe.expected import FLOAT32, Case, Expected, random, unit

__all__ = ["cases"]

BLOCK = 128
KEYS = (200, 1, 130)  # of three requests, over two blocks, one and two
TABLE = torch.tensor([[3, 1], [0, 0], [2, 4]], dtype=torch.int32)


def cases() -> Iterator[Callable[[], Case]]:
    """What builds each case."""
    for size in (64, 128):
        yield lambda size=size: _paged(f"decoding, 32 and 8 heads of {size}", (1, 1, 1), size)  # type: ignore[misc]
    yield lambda: _paged("prompts of 200, 1 and 70 tokens, 32 and 8 heads of 128", (200, 1, 70), 128)
    yield lambda: _paged("a window of 64, 32 and 8 heads of 128", (200, 1, 70), 128, window=64)
    yield lambda: _encoder("attention", "an encoder, 12 heads of 64", 64)
    yield lambda: _encoder("attention_of_any_size", "a tower, 12 heads of 72", 72)
    yield _latent


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, causal: bool) -> Expected:
    """One request in float64: query `[T, N, D]`, key and value `[S, Nkv, D]`; the last query sees the last key."""
    tokens, heads, _ = query.shape
    keys = key.shape[0]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(heads // x.shape[0], 0) for x in (k, v))
    behind = torch.arange(keys - tokens, keys)[:, None] - torch.arange(keys)
    hidden = behind < 0 if causal else torch.zeros_like(behind, dtype=torch.bool)
    if window is not None:
        hidden |= behind >= window
    weights = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    # The error of a score, in float32, is the relative error of its weight; a weight is rounded to the data type, and so is the result.
    of_score = (
        (q.abs() @ k.abs().transpose(1, 2) * scale).masked_fill(hidden, 0).amax(-1, keepdim=True)
        * (q.shape[-1] + 4)
        * FLOAT32
    )
    allowed = (3 * unit(query.dtype) + 2 * of_score + (keys + 8) * FLOAT32) * (weights @ v.abs())
    return Expected(value=(weights @ v).transpose(0, 1), allowed=allowed.transpose(0, 1))


def _all(parts: Sequence[Expected]) -> list[Expected]:
    return [Expected(value=torch.cat([x.value for x in parts]), allowed=torch.cat([x.allowed for x in parts]))]


def _rows(cache: Tensor, request: int, heads: int) -> Tensor:
    """Keys or values of a request `[S, Nkv, D]` from a cache `[blocks, block_size, Nkv * D]`."""
    return cache[TABLE[request].long()].flatten(0, 1)[: KEYS[request]].view(KEYS[request], heads, -1)


def _ends(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[: index + 1]) for index in range(len(lengths))]


def _paged(shape: str, queries: Sequence[int], size: int, window: int | None = None) -> Case:
    heads, kv_heads, scale, ends = 32, 8, size**-0.5, _ends(queries)

    def call(query: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> list[Tensor]:
        mask: dict[str, Any] = {"sparse_mode": kernels.SPARSE_CAUSAL, "atten_mask": kernels.causal_mask(query.device)}
        if window is not None:
            mask |= {"sparse_mode": kernels.SPARSE_BAND, "pre_tokens": window - 1, "next_tokens": 0}
        return [
            kernels.attention(
                query, keys, values, num_heads=heads, num_key_value_heads=kv_heads, scale=scale, block_table=table, block_size=BLOCK,
                actual_seq_lengths=ends, actual_seq_lengths_kv=list(KEYS), **mask,
            )
        ]  # fmt: skip

    def expected(query: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> list[Expected]:
        parts = [
            _attend(rows, _rows(keys, index, kv_heads), _rows(values, index, kv_heads), scale, window, True)
            for index, rows in enumerate(torch.split(query, list(queries)))
        ]
        return _all(parts)

    cache = (5, BLOCK, kv_heads * size)
    inputs = random(sum(queries), heads, size), random(*cache, seed=1), random(*cache, seed=2), TABLE
    return Case(kernel="vllm_ascend.attention", shape=shape, inputs=inputs, call=call, expected=expected)


def _encoder(kernel: str, shape: str, size: int) -> Case:
    heads, lengths, scale = 12, (50, 7), size**-0.5

    def call(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        return [
            getattr(kernels, kernel)(
                query, key, value, num_heads=heads, num_key_value_heads=heads, scale=scale, sparse_mode=kernels.SPARSE_NONE,
                actual_seq_lengths=_ends(lengths), actual_seq_lengths_kv=_ends(lengths),
            )
        ]  # fmt: skip

    def expected(query: Tensor, key: Tensor, value: Tensor) -> list[Expected]:
        parts = zip(*(torch.split(x, list(lengths)) for x in (query, key, value)), strict=True)
        return _all([_attend(q, k, v, scale, None, False) for q, k, v in parts])

    inputs = [random(sum(lengths), heads, size, seed=seed) for seed in range(3)]
    return Case(kernel=f"vllm_ascend.{kernel}", shape=shape, inputs=inputs, call=call, expected=expected)


def _latent() -> Case:
    heads, scale = 16, 192**-0.5

    def call(query: Tensor, query_rope: Tensor, latents: Tensor, key_rope: Tensor, table: Tensor) -> list[Tensor]:
        return [
            kernels.latent_attention(
                query,
                query_rope,
                latents,
                key_rope,
                query_ends=[1, 2, 3],
                kv_lengths=list(KEYS),
                block_table=table,
                mask=None,
                scale=scale,
            )
        ]

    def expected(query: Tensor, query_rope: Tensor, latents: Tensor, key_rope: Tensor, table: Tensor) -> list[Expected]:
        whole, parts = torch.cat((query, query_rope), -1), []
        for index in range(len(KEYS)):
            latent, rope = _rows(latents, index, 1), _rows(key_rope, index, 1)
            parts.append(_attend(whole[index : index + 1], torch.cat((latent, rope), -1), latent, scale, None, True))
        return _all(parts)

    inputs = (
        random(3, heads, 512), random(3, heads, 64, seed=1), random(5, BLOCK, 512, seed=2), random(5, BLOCK, 64, seed=3), TABLE,
    )  # fmt: skip
    return Case(
        kernel="vllm_ascend.latent_attention",
        shape="decoding, 16 heads of 512 + 64",
        inputs=inputs,
        call=call,
        expected=expected,
    )
