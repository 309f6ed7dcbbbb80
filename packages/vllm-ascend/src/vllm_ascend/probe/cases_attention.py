# SPDX-License-Identifier: Apache-2.0
"""The kernels of `vllm_ascend.attention.kernels`, as the backends call them: paged decoding and prompts, a window, encoders, latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_ascend.attention import kernels
from vllm_ascend.probe.expected import FLOAT32, Case, Expected, exactly, random, unit

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
    yield lambda: _paged("sinks, 32 and 8 heads of 128", (200, 1, 70), 128, sinks=True)
    yield lambda: _wide("decoding, 8 and 2 heads of 512", (0, 1, 2), 1)
    yield lambda: _wide("a prompt of 70 tokens, 8 and 2 heads of 512", (2,), 70)
    yield _masked
    yield lambda: _encoder("attention", "an encoder, 12 heads of 64", 64)
    yield lambda: _encoder("attention_of_any_size", "a tower, 12 heads of 72", 72)
    yield _latent
    yield _prompt_latent
    yield _merge
    yield _gather


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    *,
    causal: bool,
    sinks: Tensor | None = None,
) -> tuple[Expected, Expected]:
    """One request in float64: query `[T, N, D]`, key and value `[S, Nkv, D]`; the last query sees the last key. The result, and the log-sum-exp `[T, N, 1]`."""
    tokens, heads, _ = query.shape
    keys = key.shape[0]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(heads // x.shape[0], 0) for x in (k, v))
    behind = torch.arange(keys - tokens, keys)[:, None] - torch.arange(keys)
    hidden = behind < 0 if causal else torch.zeros_like(behind, dtype=torch.bool)
    if window is not None:
        hidden |= behind >= window
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:  # one score more for each head, without a value
        total = torch.logaddexp(total, sinks.double()[:, None, None])
    weights, lse = (scores - total).exp(), total.transpose(0, 1)
    # The error of a score, in float32, is the relative error of its weight; a weight is rounded to the data type, and so is the result.
    of_score = (
        (q.abs() @ k.abs().transpose(1, 2) * scale).masked_fill(hidden, 0).amax(-1, keepdim=True)
        * (q.shape[-1] + 4)
        * FLOAT32
    )
    allowed = (3 * unit(query.dtype) + 2 * of_score + (keys + 8) * FLOAT32) * (weights @ v.abs())
    result = Expected(value=(weights @ v).transpose(0, 1), allowed=allowed.transpose(0, 1))
    of_lse = of_score.transpose(0, 1) + (lse.abs() + keys + 8) * FLOAT32
    return result, Expected(value=lse, allowed=of_lse)


def _all(parts: Sequence[tuple[Expected, Expected]], outputs: int = 1) -> list[Expected]:
    """The requests one after the other: their results, or with 2 `outputs` their log-sum-exps as well."""
    kinds = list(zip(*parts, strict=True))[:outputs]
    return [
        Expected(value=torch.cat([x.value for x in kind]), allowed=torch.cat([x.allowed for x in kind]))
        for kind in kinds
    ]


def _rows(cache: Tensor, request: int, heads: int) -> Tensor:
    """Keys or values of a request `[S, Nkv, D]` from a cache `[blocks, block_size, Nkv * D]`."""
    return cache[TABLE[request].long()].flatten(0, 1)[: KEYS[request]].view(KEYS[request], heads, -1)


def _ends(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[: index + 1]) for index in range(len(lengths))]


def _paged(shape: str, queries: Sequence[int], size: int, window: int | None = None, *, sinks: bool = False) -> Case:
    heads, kv_heads, scale, ends = 32, 8, size**-0.5, _ends(queries)

    def call(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, *sink: Tensor) -> list[Tensor]:
        mask: dict[str, Any] = {"sparse_mode": kernels.SPARSE_CAUSAL, "atten_mask": kernels.causal_mask(query.device)}
        if window is not None:
            mask |= {"sparse_mode": kernels.SPARSE_BAND, "pre_tokens": window - 1, "next_tokens": 0}
        kernel = kernels.attention_with_sinks if sinks else kernels.attention
        return [
            kernel(
                query, keys, values, *sink, num_heads=heads, num_key_value_heads=kv_heads, scale=scale, block_table=table, block_size=BLOCK,
                actual_seq_lengths=ends, actual_seq_lengths_kv=list(KEYS), **mask,
            )
        ]  # fmt: skip

    def expected(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, *sink: Tensor) -> list[Expected]:
        terms: dict[str, Any] = {"causal": True, "sinks": sink[0] if sinks else None}
        parts = [
            _attend(rows, _rows(keys, index, kv_heads), _rows(values, index, kv_heads), scale, window, **terms)
            for index, rows in enumerate(torch.split(query, list(queries)))
        ]
        return _all(parts)

    cache = (5, BLOCK, kv_heads * size)
    inputs = random(sum(queries), heads, size), random(*cache, seed=1), random(*cache, seed=2), TABLE
    name = "attention_with_sinks" if sinks else "attention"
    given = (*inputs, random(heads, seed=3)) if sinks else inputs
    return Case(kernel=f"vllm_ascend.{name}", shape=shape, inputs=given, call=call, expected=expected)


def _wide(shape: str, requests: Sequence[int], tokens: int) -> Case:
    """Requests with equally many query tokens."""
    heads, kv_heads, size = 8, 2, 512
    scale, lengths = size**-0.5, [KEYS[request] for request in requests]

    def call(query: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> list[Tensor]:
        mask = {"sparse_mode": kernels.SPARSE_CAUSAL, "atten_mask": kernels.causal_mask(query.device)}
        return [
            kernels.attention_of_wide_heads(
                query, keys, values, num_heads=heads, num_key_value_heads=kv_heads, scale=scale, block_table=table, block_size=BLOCK,
                actual_seq_lengths_kv=lengths, **(mask if tokens > 1 else {"sparse_mode": kernels.SPARSE_NONE}),
            )
        ]  # fmt: skip

    def expected(query: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> list[Expected]:
        parts = [
            _attend(rows, _rows(keys, request, kv_heads), _rows(values, request, kv_heads), scale, causal=True)[0]
            for rows, request in zip(query, requests, strict=True)
        ]
        return [
            Expected(
                value=torch.stack([part.value for part in parts]), allowed=torch.stack([part.allowed for part in parts])
            )
        ]

    cache, table = (5, BLOCK, kv_heads * size), TABLE[list(requests)]
    inputs = random(len(requests), tokens, heads, size), random(*cache, seed=1), random(*cache, seed=2), table
    return Case(kernel="vllm_ascend.attention_of_wide_heads", shape=shape, inputs=inputs, call=call, expected=expected)


def _masked() -> Case:
    """Two sounds in one batch, the second one padded."""
    heads, tokens, size, lengths = 12, 50, 72, (50, 7)
    hidden = torch.arange(tokens) >= torch.tensor(lengths)[:, None]

    def call(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> list[Tensor]:
        mask = hidden[:, None, None].expand(-1, -1, tokens, -1)
        return [kernels.attention_with_mask(query, key, value, mask, size**-0.5)]

    def expected(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> list[Expected]:
        parts = []
        for n, length in enumerate(lengths):
            q, k, v = (x[n].transpose(0, 1) for x in (query, key, value))
            parts.append(_attend(q, k[:length], v[:length], size**-0.5, causal=False)[0])
        values, allowed = (
            torch.stack([getattr(part, name).transpose(0, 1) for part in parts]) for name in ("value", "allowed")
        )
        return [Expected(value=values, allowed=allowed)]

    inputs = *(random(2, heads, tokens, size, seed=seed) for seed in (1, 2, 3)), hidden
    return Case(
        kernel="vllm_ascend.attention_with_mask",
        shape="sounds of 50 and 7 tokens, 12 heads of 72",
        inputs=inputs,
        call=call,
        expected=expected,
    )


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
        return _all([_attend(q, k, v, scale, causal=False) for q, k, v in parts])

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
            parts.append(_attend(whole[index : index + 1], torch.cat((latent, rope), -1), latent, scale, causal=True))
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


def _prompt_latent() -> Case:
    heads, lengths, scale = 16, (50, 7), 192**-0.5

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        query, query_rope, key, key_rope, value = given
        return kernels.prompt_latent_attention(
            (query, query_rope), (key, key_rope), value, query_ends=_ends(lengths), kv_ends=_ends(lengths),
            mask=kernels.causal_mask(value.device), scale=scale,
        )  # fmt: skip

    def expected(*given: Tensor) -> list[Expected]:
        query, query_rope, key, key_rope, value = given
        wholes = torch.cat((query, query_rope), -1), torch.cat((key, key_rope.expand(-1, heads, -1)), -1), value
        parts = zip(*(torch.split(x, list(lengths)) for x in wholes), strict=True)
        return _all([_attend(q, k, v, scale, causal=True) for q, k, v in parts], outputs=2)

    tokens = sum(lengths)
    inputs = (
        random(tokens, heads, 128), random(tokens, heads, 64, seed=1), random(tokens, heads, 128, seed=2), random(tokens, 1, 64, seed=3),
        random(tokens, heads, 128, seed=4),
    )  # fmt: skip
    return Case(
        kernel="vllm_ascend.prompt_latent_attention", shape="prompts of 50 and 7 tokens, 16 heads of 128 + 64", inputs=inputs, call=call,
        expected=expected,
    )  # fmt: skip


def _merge() -> Case:
    def call(first: Tensor, second: Tensor, of_first: Tensor, of_second: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.merge_attention([first, second], [of_first, of_second])

    def expected(first: Tensor, second: Tensor, of_first: Tensor, of_second: Tensor) -> list[Expected]:
        lse = torch.logaddexp(of_first.double(), of_second.double())
        weights = (of_first.double() - lse).exp(), (of_second.double() - lse).exp()
        parts = first.double() * weights[0], second.double() * weights[1]
        of_lse = (lse.abs() + of_first.double().abs() + of_second.double().abs() + 8) * FLOAT32
        allowed = (parts[0].abs() + parts[1].abs()) * (8 * FLOAT32 + 4 * of_lse)
        return [Expected(value=parts[0] + parts[1], allowed=allowed), Expected(value=lse, allowed=2 * of_lse)]

    rows = [random(8, 16, 128, dtype=torch.float32, seed=seed) for seed in range(2)]
    lses = [random(8, 16, 1, dtype=torch.float32, seed=seed, scale=3.0) for seed in (2, 3)]
    return Case(
        kernel="vllm_ascend.merge_attention",
        shape="two parts, 16 heads of 128",
        inputs=(*rows, *lses),
        call=call,
        expected=expected,
    )


def _gather() -> Case:
    """Latents and rotary keys of three requests, from the second block on where there are two."""
    starts, lengths = torch.tensor([BLOCK, 0, 0], dtype=torch.int32), torch.tensor([72, 1, 130], dtype=torch.int32)
    rows = int(lengths.sum())

    def call(keys: Tensor, values: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        table, lengths, starts = given
        return kernels.gather_kv(keys, values, table, lengths, starts, rows)

    def expected(keys: Tensor, values: Tensor, *given: Tensor) -> list[Expected]:
        found = []
        for cache in (keys, values):
            parts = [
                cache[TABLE[request].long()].flatten(0, 1)[start : start + length]
                for request, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
            ]
            found.append(exactly(torch.cat(parts)))
        return found

    inputs = random(5, BLOCK, 1, 512), random(5, BLOCK, 1, 64, seed=1), TABLE, lengths, starts
    return Case(
        kernel="vllm_ascend.gather_kv",
        shape="parts of three requests, 512 and 64 wide",
        inputs=inputs,
        call=call,
        expected=expected,
    )
