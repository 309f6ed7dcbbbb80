# SPDX-License-Identifier: Apache-2.0
"""A step as layers with a recurrent state see it, and where the states of its requests are.

vLLM keeps a request's state in a block of the cache. Its own builders of metadata prepare what Triton kernels take, and read lengths on the device;
this one describes the step on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

__all__ = ["AscendStateBackend", "Batch", "RecurrentStep", "States", "batches_of", "step_of"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that have equally many tokens in this step, computed together.

    Attributes:
        first: their first token among those of the step.
        requests: R.
        tokens: T of each.
        continues: whether they have a state already, all or none.
        slots: int64 `[R]`, block of each one's state.
    """

    first: int
    requests: int
    tokens: int
    continues: bool
    slots: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """Their rows among those of the step, `[tokens, ...]` -> `[R, T, ...]`."""
        mine = rows[self.first : self.first + self.requests * self.tokens]
        return mine.reshape(self.requests, self.tokens, *rows.shape[1:])


@dataclass(slots=True)
class RecurrentStep(AttentionMetadata):
    """One step's requests, for all layers of a KV-cache group. What the attention's metadata have too is read from whichever layer is the first.

    Attributes:
        num_actual_tokens: tokens of the step, without padding.
        query_ends: cumulative tokens of the requests.
        batches: the requests that decode, together, then each other one; none of a request without tokens.
    """

    num_actual_tokens: int
    query_ends: list[int]
    batches: list[Batch]

    @property
    def num_requests(self) -> int:
        """Requests of the step."""
        return len(self.query_ends)


class AscendStateBackend(AttentionBackend):
    """What vLLM asks of the backend of such a layer: who describes a step, and how states lie."""

    @staticmethod
    def get_name() -> str:
        """For messages."""
        return "ASCEND_STATE"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is none: the layer itself computes."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[RecurrentStepBuilder]:
        """The class that prepares a step."""
        return RecurrentStepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """That of attention beside such layers, though states could lie in any: a pipeline stage without attention must name the same one as the others."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def is_ssm(cls) -> bool:
        """Blocks of such a layer hold a state, not tokens."""
        return True


class RecurrentStepBuilder(AttentionMetadataBuilder[RecurrentStep]):
    """Turns vLLM's description of a step into batches. Requests that decode come first, as vLLM orders them at this threshold."""

    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        """Keep what is given."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RecurrentStep:
        """One step."""
        step = common_attn_metadata
        table = mamba_get_block_table_tensor(
            step.block_table_tensor, step.seq_lens, self.kv_cache_spec, self.vllm_config.cache_config.mamba_cache_mode
        )
        # vLLM keeps block 0 free of requests: what is written for a row of padding, whose slot is -1, goes there.
        slots = table[: step.num_reqs, 0].clamp(min=0).long()
        lengths = step.seq_lens_cpu_upper_bound
        lengths = step.seq_lens.cpu() if lengths is None else lengths
        starts = step.query_start_loc_cpu[: step.num_reqs + 1].tolist()
        return RecurrentStep(
            step.num_actual_tokens, starts[1:], batches_of(starts, lengths[: step.num_reqs].tolist(), slots)
        )


def batches_of(starts: list[int], lengths: list[int], slots: Tensor) -> list[Batch]:
    """The requests of a step in batches.

    Args:
        starts: first token of each request, and the end of the last one.
        lengths: tokens of each request, with those of this step.
        slots: int64 `[requests]`, block of each one's state.
    """
    counts = [end - start for start, end in pairwise(starts)]
    earlier = [length - count for length, count in zip(lengths, counts, strict=True)]
    decoding = 0
    while decoding < len(counts) and counts[decoding] == 1 and earlier[decoding] > 0:
        decoding += 1
    batches = [Batch(0, decoding, 1, True, slots[:decoding])] if decoding else []
    return batches + [
        Batch(starts[row], 1, counts[row], earlier[row] > 0, slots[row : row + 1])
        for row in range(decoding, len(counts))
        if counts[row]
    ]


def step_of(layer_name: str) -> RecurrentStep | None:
    """The step of the forward pass that runs; None in one without requests, which has no states."""
    metadata: Any = get_forward_context().attn_metadata
    return metadata.get(layer_name) if isinstance(metadata, dict) else None


@dataclass(frozen=True, slots=True)
class States:
    """A layer's caches: windows of the convolution, `[blocks, W - 1, D]`, and states of the recurrence, `[blocks, ...]`."""

    windows: Tensor
    recurrent: Tensor

    @classmethod
    def of(cls, kv_cache: tuple[Tensor, ...]) -> States:
        """The caches of a layer, as vLLM binds them."""
        windows, recurrent = kv_cache
        return cls(windows.transpose(1, 2) if is_conv_state_dim_first() else windows, recurrent)

    @staticmethod
    def through(
        cache: Tensor, step: RecurrentStep, compute: Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Compute each batch from its part of a cache, and keep there what it leaves.

        Args:
            cache: one of the two.
            step: the requests.
            compute: batch and what the cache has of it `[R, ...]`, zero for a request that begins -> outputs `[R, T, ...]` and what the cache is to have.

        Returns:
            Outputs of all the step's tokens `[tokens, ...]`.
        """
        outputs = []
        for batch in step.batches:
            held = cache.index_select(0, batch.slots) if batch.continues else cache.new_zeros(1, *cache.shape[1:])
            output, left = compute(batch, held)
            cache.index_copy_(0, batch.slots, left.to(cache.dtype))
            outputs.append(output.flatten(0, 1))
        return torch.cat(outputs)
