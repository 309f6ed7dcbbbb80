# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels take of a model and its cache. No vLLM here."""

from __future__ import annotations

__all__ = ["check_cache_dtype", "check_latent"]

LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


def check_cache_dtype(kv_cache_dtype: str) -> None:
    """Raise ValueError for a KV cache of another dtype than the model's float one."""
    if kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; vllm-ascend supports auto, float16, bfloat16")


def check_latent(text_config: object, heads: int) -> None:
    """Check that a model's multi-head latent attention fits `npu_fused_infer_attention_score` in its absorbed form.

    Args:
        text_config: the Hugging Face config of the language model.
        heads: attention heads of one rank.

    Raises:
        ValueError: a size that the kernel does not take.
    """
    for name, size in LATENT_SIZES.items():
        found = getattr(text_config, name, None)
        if found != size:
            raise ValueError(
                f"{name} of this model is {found}: the NPU's kernel for multi-head latent attention takes {size} only"
            )
    if heads not in LATENT_HEADS:
        raise ValueError(
            f"multi-head latent attention with {heads} heads a rank: the NPU's kernel takes "
            f"{', '.join(map(str, LATENT_HEADS))}; change tensor_parallel_size if another one fits"
        )
