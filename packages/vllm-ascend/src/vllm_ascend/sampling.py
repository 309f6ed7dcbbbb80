# SPDX-License-Identifier: Apache-2.0
"""Top-k and top-p before a token is drawn: one kernel where its limits allow, in the place of vLLM's sort of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from vllm_ascend import kernels

if TYPE_CHECKING:
    from vllm.v1.sample.sampler import Sampler

__all__ = ["AscendTopKTopPSampler"]


class AscendTopKTopPSampler(TopKTopPSampler):
    """vLLM's sampler, with the kernel before it in steps whose requests all have a top_k that the kernel takes, or none has one.

    A request without top_k beside one with it has the whole vocabulary as its top_k: such a step is sorted, as are steps whose top_k nobody has told.
    """

    def __init__(self, sampler: Sampler) -> None:
        """Take the place of the one that `sampler` has."""
        replaced = sampler.topk_topp_sampler
        super().__init__(replaced.logprobs_mode, replaced.use_fp64_gumbel)
        self.forward = self.filter_and_draw
        self._largest_k: int | None = None
        sampler.topk_topp_sampler = self

    @contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """Draw tokens for the requests of vLLM's `InputBatch`, whose top_k are known on the host, so that nothing waits for the device."""
        self._largest_k = int(batch.top_k_cpu[: batch.num_reqs].max(initial=0))
        try:
            yield
        finally:
            self._largest_k = None

    def filter_and_draw(
        self, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A token for each row, and its logits where they are asked for.

        Args:
            logits: float32 `[rows, vocabulary]`; may be changed.
            generators: of the rows that have a seed of their own.
            k: int32 `[rows]`, or None.
            p: float32 `[rows]`, or None.
        """
        small = k is None or (self._largest_k is not None and self._largest_k <= kernels.MOST_TOP_K)
        if small and not (k is None and p is None):
            logits, k, p = kernels.top_k_top_p(logits, k, p), None, None
        drawn: tuple[Tensor, Tensor | None] = self.forward_native(logits, generators, k, p)
        return drawn
