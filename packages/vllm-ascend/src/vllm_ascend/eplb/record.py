# SPDX-License-Identifier: Apache-2.0
"""How many tokens each expert got, summed up over intervals of steps and written to a file that `ascend-eplb plan` reads.

Legend: M MoE layers, R ranks that share the experts, K slots of a rank.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from ascend_comm import CommGroup
from ascend_eplb import Placement, logical_load, write_loads

from vllm_ascend.config import EplbConfig

__all__ = ["LoadRecorder"]

_logger = logging.getLogger("vllm_ascend")
_MOST_ENTRIES = 1000


class LoadRecorder:
    """Counts of one worker's MoE layers.

    Args:
        config: the file, and the steps of an interval.
        placed: the placement of each layer, one layer each.
        counts: int64 `[K]` of each layer, to which the layer adds; set to 0 here after each interval.
        ep: the R ranks.
        writes: whether this rank writes the file.

    Raises:
        ValueError: layers that differ in the number of experts.
    """

    def __init__(
        self,
        config: EplbConfig,
        placed: Sequence[Placement],
        counts: Sequence[torch.Tensor],
        ep: CommGroup,
        writes: bool,
    ) -> None:
        """Nothing is recorded yet."""
        experts = {one.num_experts for one in placed}
        if len(experts) != 1:
            raise ValueError(
                f"option 'eplb_config.expert_load_record_path' ({config.expert_load_record_path!r}) needs MoE layers with equal numbers "
                f"of experts, got {sorted(experts)}"
            )
        self._config, self._counts, self._ep, self._writes = config, counts, ep, writes
        self._placement = Placement(np.concatenate([one.physical_to_logical for one in placed]), experts.pop())
        self._steps = 0
        self._entries: deque[np.ndarray] = deque(maxlen=_MOST_ENTRIES)

    def step(self) -> None:
        """One step is over, with requests on this rank or not: all ranks count the same steps, and meet after each interval."""
        self._steps += 1
        if self._steps % self._config.expert_heat_collection_interval:
            return
        here = torch.stack(tuple(self._counts))
        for count in self._counts:
            count.zero_()
        everywhere = self._ep.all_gather(here, 0).view(self._ep.world_size, *here.shape)
        if self._writes:
            self._write(everywhere.cpu().numpy().transpose(1, 0, 2))

    def _write(self, counts: np.ndarray) -> None:
        """Add an entry of counts `[M, R, K]` to the file, which is written anew as a whole. What cannot be written now is tried again with the next entry."""
        self._entries.append(logical_load(self._placement, counts))
        path = self._config.expert_load_record_path
        try:
            write_loads(np.stack(self._entries), path)
        except OSError as error:
            _logger.error("the experts' loads cannot be written to %r: %s", path, error)
