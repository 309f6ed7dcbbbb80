# SPDX-License-Identifier: Apache-2.0
"""The exact lengths of keys in a draft's passes, on the host, from where the attention kernels take them.

vLLM gives attention lengths on the device that are exact, and bounds on the host that still count rejected drafts. Its first pass after a step of the model sees the
rejected tokens as padding, so that its lengths are known. Those of the next pass are less by as many as were rejected, which only the device knows before the step's
tokens have been sampled. The host waits for these numbers once, while the device computes the first pass: the copy was asked for before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["AcceptedCounts", "DraftLengths"]


class AcceptedCounts:
    """The tokens that each request has won in a step, on their way to the host.

    Args:
        most: requests of a step at most.
    """

    def __init__(self, most: int) -> None:
        """Take pinned memory, and a stream for the copies."""
        self._host = torch.empty(most, dtype=torch.int32, pin_memory=True)
        self._stream, self._done = torch.npu.Stream(), torch.npu.Event()

    def copy(self, counts: Tensor) -> None:
        """Begin to copy `[requests]`; no later work on the current stream waits for the copy."""
        self._stream.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(self._stream):
            self._host[: counts.shape[0]].copy_(counts, non_blocking=True)
            self._done.record()
        counts.record_stream(self._stream)

    def wait(self) -> NDArray[np.int32]:
        """What the last copy has brought, once it is there."""
        self._done.synchronize()
        found: NDArray[np.int32] = self._host.numpy()
        return found


class DraftLengths:
    """Writes exact lengths into vLLM's descriptions of a draft's passes.

    Args:
        drafter: vLLM's proposer, whose descriptions pass through here.
        most: requests of a step at most.
    """

    def __init__(self, drafter: Any, most: int) -> None:
        """Put `describe` before the proposer's own method."""
        self.counts = AcceptedCounts(most)
        self._begins = self._drafted = np.zeros(0, dtype=np.int32)
        self._build: Callable[..., Any] = drafter.build_per_group_and_layer_attn_metadata
        drafter.build_per_group_and_layer_attn_metadata = self.describe
        self._padded = not drafter.speculative_config.disable_padded_drafter_batch

    def begin(self, begins: NDArray[np.int32], drafted: list[int] | None) -> None:
        """What the host knows of the model's step.

        Args:
            begins: `[requests]`, the position of the first token of each.
            drafted: tokens of each that had been drafted; None: of no request.
        """
        self._begins = begins.copy()
        self._drafted = np.zeros_like(self._begins) if drafted is None else np.array(drafted, dtype=np.int32)

    def describe(self, step: Any, draft_index: int = 0) -> Any:
        """What `build_per_group_and_layer_attn_metadata` does, with exact lengths.

        Args:
            step: vLLM's description of a pass. Its lengths on the host are written; from one pass to the next vLLM itself adds one token to them.
            draft_index: the number of the pass.
        """
        if draft_index == 0:
            queries = step.query_start_loc_cpu.diff()
            step.seq_lens_cpu_upper_bound = torch.from_numpy(self._begins[: len(queries)]) + queries
        elif draft_index == 1 and self._padded and self._drafted.any():
            won = self.counts.wait()[: len(self._drafted)]
            rejected = np.where(self._drafted > 0, self._drafted + 1 - won, 0)
            step.seq_lens_cpu_upper_bound -= torch.from_numpy(rejected.astype(np.int32))
        return self._build(step, draft_index=draft_index)
