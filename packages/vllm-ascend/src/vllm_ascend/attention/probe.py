# SPDX-License-Identifier: Apache-2.0
"""One token's attention on the device, before the model is loaded: what a kernel refuses is found here and not at the first request.

Which dtypes and sizes a kernel takes differs between chips and versions of CANN. Only the kernel itself knows it.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_ascend.attention import kernels
from vllm_ascend.attention.limits import BLOCK_SIZES, LATENT_BLOCK_SIZE, PLAIN_SIZE, Attention

__all__ = ["check"]


def check(attention: Attention, device: torch.device) -> None:
    """Write one token's keys and values into a cache of one block, and attend to them, in every form in which the model's layers will.

    Args:
        attention: of the model; nothing is computed where its sizes are not known.
        device: the NPU of this worker.

    Raises:
        ValueError: a kernel refuses the model's dtype or sizes; the message has the kernel's own words.
    """
    if not attention.heads:
        return
    try:
        if not attention.cached:
            _encoder(attention, device)
        else:
            _latent(attention, device) if attention.latent is not None else _grouped(attention, device)
        torch.accelerator.synchronize(device)  # a kernel that runs later says later what it refuses
    except RuntimeError as error:
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"an attention kernel of this NPU does not take the model: dtype {attention.dtype}, {attention.heads} heads and "
            f"{attention.kv_heads} of keys and values, {attention.head_size} wide, over tensor_parallel_size {attention.ranks}: {said}. "
            "the kernels are documented for bfloat16 (--dtype bfloat16)"
        ) from error


def _grouped(attention: Attention, device: torch.device) -> None:
    heads, kv_heads = attention.heads // attention.ranks, max(attention.kv_heads // attention.ranks, 1)
    size, block = attention.kernel_size, BLOCK_SIZES[0]
    options = {"dtype": getattr(torch, attention.dtype), "device": device}
    rows = torch.zeros(1, kv_heads, size, **options)
    keys, values = torch.zeros(2, 1, block, kv_heads, size, **options).unbind()
    kernels.scatter_kv(rows, rows, keys, values, torch.zeros(1, dtype=torch.int64, device=device))
    key, value = keys.view(1, block, -1), values.view(1, block, -1)
    shared: dict[str, Any] = {
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": 1.0,
        "block_table": torch.zeros(1, 1, dtype=torch.int32, device=device),
        "block_size": block,
    }
    causal: dict[str, Any] = {"sparse_mode": kernels.SPARSE_CAUSAL, "atten_mask": kernels.causal_mask(device)}
    if attention.is_wide:
        for tokens, mask in ((1, {"sparse_mode": kernels.SPARSE_NONE}), (2, causal)):
            query = torch.zeros(1, tokens, heads, size, **options)
            kernels.attention_of_wide_heads(query, key, value, actual_seq_lengths_kv=[tokens], **shared, **mask)
        return
    query = torch.zeros(1, heads, size, **options)
    one: dict[str, Any] = {"actual_seq_lengths": [1], "actual_seq_lengths_kv": [1]}
    if attention.sinks:
        kernels.attention_with_sinks(query, key, value, torch.zeros(heads, **options), **one, **shared, **causal)
    else:
        kernels.attention(query, key, value, **one, **shared, **causal)


def _encoder(attention: Attention, device: torch.device) -> None:
    heads, kv_heads = attention.heads // attention.ranks, max(attention.kv_heads // attention.ranks, 1)
    options = {"dtype": getattr(torch, attention.dtype), "device": device}
    rows = torch.zeros(1, kv_heads, attention.head_size, **options)
    kernels.attention_of_any_size(
        torch.zeros(1, heads, attention.head_size, **options),
        rows,
        rows,
        num_heads=heads,
        num_key_value_heads=kv_heads,
        scale=1.0,
        actual_seq_lengths=[1],
        actual_seq_lengths_kv=[1],
        sparse_mode=kernels.SPARSE_NONE,
    )


def _latent(attention: Attention, device: torch.device) -> None:
    assert attention.latent is not None
    heads, (latent, rope) = attention.heads // attention.ranks, attention.latent
    options = {"dtype": getattr(torch, attention.dtype), "device": device}
    latents, keys = (
        torch.zeros(1, LATENT_BLOCK_SIZE, latent, **options),
        torch.zeros(1, LATENT_BLOCK_SIZE, rope, **options),
    )
    kernels.scatter_kv(
        latents[:, :1],
        keys[:, :1],
        latents.unsqueeze(2),
        keys.unsqueeze(2),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    kernels.latent_attention(
        torch.zeros(1, heads, latent, **options),
        torch.zeros(1, heads, rope, **options),
        latents,
        keys,
        query_ends=[1],
        kv_lengths=[1],
        block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
        mask=None,
        scale=1.0,
    )
    if attention.plain_form:
        rows, rotated = torch.zeros(1, heads, PLAIN_SIZE, **options), torch.zeros(1, heads, rope, **options)
        out, lse = kernels.prompt_latent_attention(
            (rows, rotated),
            (rows, rotated[:, :1]),
            rows,
            query_ends=[1],
            kv_ends=[1],
            mask=kernels.causal_mask(device),
            scale=1.0,
        )
        kernels.merge_attention([out, out], [lse, lse])
