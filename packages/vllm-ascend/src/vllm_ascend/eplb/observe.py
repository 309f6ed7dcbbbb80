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
    """Which tokens of the step that runs count: rows on the device at a fixed place, written before the step and read by all MoE layers, also by captured ones.

    Args:
        stage: one of `options.STAGES`.
        rows: of a layer at most: the tokens of a step with their padding.
        device: where they are.
    """

    def __init__(self, stage: str, rows: int, device: torch.device | str) -> None:
        """Begin without a step."""
        self._stage, self._device = stage, device
        self._size, self._filled = rows, 0
        self._rows: dict[int, Tensor] = {}

    def reserve(self, copies: int) -> None:
        """Make room for layers that ask for each row `copies` times."""
        if copies not in self._rows:
            self._rows[copies] = torch.zeros(self._size, copies, dtype=torch.int32, device=self._device)

    def begin(self, query_ends: Sequence[int]) -> None:
        """A step begins with tokens up to these cumulative numbers; without any nothing counts."""
        tokens = query_ends[-1] if query_ends else 0
        rows = max(tokens, self._filled)  # those of the step before are overwritten as well
        self._filled = tokens
        if rows:
            counted = torch.from_numpy(counted_rows(query_ends, rows, self._stage))
            for copies, there in self._rows.items():
                there[:rows].copy_(counted[:, None].expand(-1, copies).contiguous().pin_memory(), non_blocking=True)

    def add(self, heat: Tensor, ids: Tensor, *, first: int = 0) -> None:
        """Add a layer's tokens to its counts.

        Args:
            heat: int32 `[E]`.
            ids: `[N, C]`, the experts that were chosen; C was reserved.
            first: the token that the first row is.
        """
        if len(ids):
            heat.index_add_(0, ids.flatten(), self.rows(ids.shape[1], len(ids), first=first).flatten())

    def rows(self, copies: int, count: int, *, first: int = 0) -> Tensor:
        """int32 `[count, copies]`: 1 for a row that counts, from the token `first` on. A view."""
        return self._rows[copies][first : first + count]


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
