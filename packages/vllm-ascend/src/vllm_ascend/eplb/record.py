# SPDX-License-Identifier: Apache-2.0
"""How many tokens each expert got, summed up over intervals of steps and written to a file that `ascend-eplb plan` reads.

Legend: M MoE layers, R ranks that share the experts, K slots of a rank, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed
from ascend_comm import CommGroup
from ascend_eplb import Placement, logical_load
from torch import Tensor

from vllm_ascend.eplb.observe import taken
from vllm_ascend.eplb.options import EplbConfig
from vllm_ascend.eplb.writer import LoadWriter
from vllm_ascend.host_copy import HostCopy

__all__ = ["LoadRecorder"]

_logger = logging.getLogger("vllm.vllm_ascend")
# How long a rank that shuts down waits for the others, and then for its file. vLLM ends a worker that takes more than five seconds in all
# (VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS), and kills it four seconds later.
_LAST_MEETING = timedelta(seconds=2)
_SECONDS_TO_WRITE = 1.5


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
        counts: Sequence[Tensor],
        ep: CommGroup,
        writes: bool,
    ) -> None:
        """Start the writer on the rank that writes."""
        experts = {one.num_experts for one in placed}
        if len(experts) != 1:
            raise ValueError(
                f"option 'eplb_config.expert_load_record_path' ({config.expert_load_record_path!r}) needs MoE layers with equal numbers "
                f"of experts, got {sorted(experts)}"
            )
        self._interval, self._counts, self._ep = config.expert_heat_collection_interval, counts, ep
        self._placement = Placement(np.concatenate([one.physical_to_logical for one in placed]), experts.pop())
        self._writer = LoadWriter(config.expert_load_record_path) if writes else None
        self._steps = 0

    def step(self) -> None:
        """One step is over, with requests on this rank or not: all ranks count the same steps, and gather their counts after each interval."""
        self._steps += 1
        if self._steps < self._interval:
            return
        self._steps = 0
        here = taken(self._counts)
        try:
            everywhere = self._ep.all_gather(here, 0).view(self._ep.world_size, *here.shape)
        except RuntimeError as error:
            raise RuntimeError(
                f"the experts' loads of {self._ep.world_size} ranks, for option 'eplb_config.expert_load_record_path', cannot be gathered: {error}"
            ) from error
        if self._writer is not None:
            self._writer.put(partial(self._entry, HostCopy(everywhere).result))

    def close(self) -> None:
        """Write the steps since the last whole interval, and everything that still waits. More calls do nothing.

        The ranks of a run that ends are not in step: each waits for the others for two seconds at most, and without all of them only the steps since
        the last whole interval are lost. For the file it waits 1.5 seconds at most.
        """
        writer, self._writer = self._writer, None
        if self._steps:
            self._steps = 0
            everywhere = self._gathered_at_the_end(taken(self._counts).cpu())
            if writer is not None and everywhere is not None:
                writer.put(partial(self._entry, lambda: everywhere))
        if writer is not None:
            writer.close(_SECONDS_TO_WRITE)

    def _entry(self, counts: Callable[[], Tensor]) -> np.ndarray:
        """Counts `[R, M, K]` of slots -> loads `[M, E]` of experts. Runs in the writer's thread."""
        return logical_load(self._placement, counts().numpy().transpose(1, 0, 2))

    def _gathered_at_the_end(self, here: Tensor) -> Tensor | None:
        """Counts `[R, M, K]` on the host; None where a rank does not come."""
        group = self._ep.cpu_group
        if group is None:
            return here[None]
        parts = [torch.empty_like(here) for _ in range(self._ep.world_size)]
        try:
            torch.distributed.monitored_barrier(group, timeout=_LAST_MEETING)
            torch.distributed.all_gather(parts, here, group=group)
        except RuntimeError as error:
            _logger.warning(
                "the experts' loads of the last steps are not recorded, for a rank has ended before: %s", error
            )
            return None
        return torch.stack(parts)
