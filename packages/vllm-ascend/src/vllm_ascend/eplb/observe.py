# SPDX-License-Identifier: Apache-2.0
"""Tokens per expert and layer, counted where tokens come from: one kernel a MoE layer, and no wait.

Counting logical experts at the sender, and not slots at the receiver, has three reasons: a placement may change between two counts, the phase of a token
is known there, and so is padding.

Legend: N rows of a layer on this rank, C experts of a token, M MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_ascend.host_copy import HostCopy

__all__ = ["CountedRows", "LoadSnapshot", "counted_rows", "taken"]


def counted_rows(query_ends: Sequence[int], rows: int, stage: str, *, first: int = 0) -> np.ndarray:
    """int32 `[N]`: 1 for each row that counts, 0 for padding and for tokens of the other phase.

    Args:
        query_ends: cumulative tokens of the step's requests; empty in a step without any.
        rows: N.
        stage: one of `options.STAGES`. A request with one token in the step is decoding, one with more is in its prefill.
        first: the token that the first row is.
    """
    lengths = np.diff(np.asarray(query_ends, dtype=np.int64), prepend=0)
    counts = np.ones_like(lengths) if stage == "all" else (lengths > 1) == (stage == "prefill")
    tokens = np.repeat(counts.astype(np.int32), lengths)
    here = tokens[first : first + rows]
    return np.pad(here, (0, rows - len(here)))


class CountedRows:
    """Which rows of the step that runs count, on the device: made by its first MoE layer, and used by all.

    Args:
        stage: one of `options.STAGES`.
    """

    def __init__(self, stage: str) -> None:
        """Begin without a step."""
        self._stage = stage
        self._of: tuple[object, int, int, int] | None = None
        self._weights: Tensor | None = None

    def add(self, heat: Tensor, ids: Tensor, query_ends: Sequence[int] | None, *, first: int = 0) -> None:
        """Add a layer's tokens to its counts.

        Args:
            heat: int32 `[E]`.
            ids: `[N, C]`, the experts that were chosen.
            query_ends: as of `counted_rows`, one object for all layers of a step; None or empty in a step without requests, which adds nothing.
            first: the token that the first row is.
        """
        if not query_ends or not len(ids):
            return
        key = (query_ends, *ids.shape, first)
        if self._of is None or self._of[0] is not query_ends or self._of != key:
            rows = np.repeat(counted_rows(query_ends, len(ids), self._stage, first=first), ids.shape[1])
            self._of, self._weights = key, torch.from_numpy(rows).pin_memory().to(ids.device, non_blocking=True)
        assert self._weights is not None
        heat.index_add_(0, ids.flatten(), self._weights)


def taken(counters: Sequence[Tensor]) -> Tensor:
    """`[M, ...]`: what M counters have counted. They begin anew."""
    counts = torch.stack(tuple(counters))
    torch._foreach_zero_(list(counters))
    return counts


class LoadSnapshot(HostCopy):
    """The counts of one interval on their way to the host. The counters begin anew.

    Args:
        heat: int32 `[E]` of each of M layers.
    """

    def __init__(self, heat: Sequence[Tensor]) -> None:
        """Begin the copy."""
        super().__init__(taken(heat))

    def counts(self) -> Tensor:
        """int64 `[M, E]` on the host, where `is_there`."""
        return self._host.to(torch.int64)
