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

from vllm_ascend.host_copy import HostCopy

__all__ = ["DraftLengths"]


class DraftLengths:
    """Writes exact lengths into vLLM's descriptions of a draft's passes.

    Args:
        drafter: vLLM's proposer, whose descriptions pass through here.

    Attributes:
        won: int32 `[requests]`, the tokens that each has won in the model's step: those that were kept and one more. On its way before the draft begins.
    """

    def __init__(self, drafter: Any) -> None:
        """Put `describe` before the proposer's own method."""
        self.won: HostCopy | None = None
        self._begins = self._drafted = np.zeros(0, dtype=np.int32)
        self._build: Callable[..., Any] = drafter.build_per_group_and_layer_attn_metadata
        drafter.build_per_group_and_layer_attn_metadata = self.describe

    def begin(self, begins: NDArray[np.int32], drafted: list[int]) -> None:
        """What the host knows of the model's step.

        Args:
            begins: `[requests]`, the position of the first token of each.
            drafted: tokens of each that had been drafted.
        """
        self._begins, self._drafted = begins.copy(), np.array(drafted, dtype=np.int32)

    def describe(self, step: Any, draft_index: int = 0) -> Any:
        """What `build_per_group_and_layer_attn_metadata` does, with exact lengths.

        Args:
            step: vLLM's description of a pass. Its lengths on the host are written; from one pass to the next vLLM itself adds one token to them.
            draft_index: the number of the pass. Where no counts have been copied, rejected tokens are not among those of the first.
        """
        if draft_index == 0:
            queries = step.query_start_loc_cpu.diff()
            step.seq_lens_cpu_upper_bound = torch.from_numpy(self._begins[: len(queries)]) + queries
        elif draft_index == 1 and self._drafted.any() and self.won is not None:
            rejected = np.where(self._drafted > 0, self._drafted + 1 - self.won.result().numpy(), 0)
            step.seq_lens_cpu_upper_bound -= torch.from_numpy(rejected.astype(np.int32))
        return self._build(step, draft_index=draft_index)
