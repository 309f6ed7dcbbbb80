# SPDX-License-Identifier: Apache-2.0
"""A step as the attention backends see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

__all__ = ["AscendAttentionMetadata", "describe", "groups", "has_prompts", "query_ends", "tokens_of_step"]


@dataclass(slots=True)
class AscendAttentionMetadata(AttentionMetadata):
    """One step's lengths, for all layers of a KV-cache group.

    Attributes:
        num_actual_tokens: query tokens T, without padding.
        query_ends: cumulative query lengths, last one T.
        kv_lengths: keys of each request.
        block_table: int32 `[requests, blocks]`.
        mask: the compressed causal mask.
        causal: whether a query sees later keys not at all.
        slot_mapping: set by vLLM where layers of cross-attention write the keys of an encoder.
    """

    num_actual_tokens: int
    query_ends: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    mask: Tensor
    causal: bool
    slot_mapping: Tensor | None = field(default=None, kw_only=True)

    @property
    def num_requests(self) -> int:
        """Requests of the step."""
        return len(self.query_ends)


def describe(step: CommonAttentionMetadata, mask: Tensor) -> AscendAttentionMetadata:
    """vLLM's description of a step as kernel arguments.

    Raises:
        ValueError: the causal flags of requests differ.
    """
    if not isinstance(step.causal, bool):
        raise ValueError("vllm-ascend attention takes one causal flag for all requests of a step")
    lengths = step.seq_lens_cpu_upper_bound
    if lengths is None:
        lengths = step.seq_lens.cpu()
    return AscendAttentionMetadata(
        num_actual_tokens=step.num_actual_tokens,
        query_ends=step.query_start_loc_cpu[1 : step.num_reqs + 1].tolist(),
        kv_lengths=lengths[: step.num_reqs].tolist(),
        block_table=step.block_table_tensor[: step.num_reqs],
        mask=mask,
        causal=step.causal,
    )


def groups(query_ends: Sequence[int], kind: Callable[[int, int], object]) -> Iterator[tuple[int, int, slice]]:
    """Consecutive requests of one kind: the first, the one after the last, and the query tokens of all of them.

    Args:
        query_ends: cumulative query lengths of the requests.
        kind: of a request, by its place and how many query tokens it has.
    """
    starts = [0, *query_ends]
    lengths = [end - start for start, end in pairwise(starts)]
    for _, group in groupby(range(len(lengths)), key=lambda request: kind(request, lengths[request])):
        requests = list(group)
        yield requests[0], requests[-1] + 1, slice(starts[requests[0]], starts[requests[-1] + 1])


def tokens_of_step() -> int:
    """Query tokens of this step's requests, without padding; 0 in a step without requests.

    vLLM gives padding tokens slots of -1, and so every token of a step without requests. The cache kernels take no such slot.
    """
    step = _of_one_layer(get_forward_context().attn_metadata)
    return 0 if step is None else int(step.num_actual_tokens)


def query_ends(attn_metadata: object) -> list[int]:
    """Cumulative tokens of a step's requests; empty in a step without requests. `attn_metadata` is as vLLM's forward context has it."""
    step = _of_one_layer(attn_metadata)
    ends: list[int] = [] if step is None else step.query_ends
    return ends


def has_prompts(attn_metadata: object) -> bool:
    """Whether some request of the step has more than one new token; `attn_metadata` as vLLM's forward context has it."""
    step = _of_one_layer(attn_metadata)
    return step is not None and step.num_actual_tokens > step.num_requests


def _of_one_layer(attn_metadata: Any) -> Any:
    """The description of the step by one of the attention layers, for in what it is read here they are alike; of the first of several microbatches.

    None without requests. Layers with a recurrent state have descriptions of vLLM's own, which lack what is read here.
    """
    if not attn_metadata:
        return None
    layers = attn_metadata if isinstance(attn_metadata, dict) else attn_metadata[0]
    return next((one for one in layers.values() if hasattr(one, "query_ends")), None)
