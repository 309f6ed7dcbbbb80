# SPDX-License-Identifier: Apache-2.0
"""What vLLM's groups communicate with: torch.distributed over HCCL, and the collectives of unequal parts that vLLM's base class leaves out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["AscendCommunicator"]


class AscendCommunicator(DeviceCommunicatorBase):
    """Unequal parts are padded to the longest: HCCL's collectives want equal ones.

    The expert parallel group gathers all tokens and scatters the sums (`AgRsAll2AllManager`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's."""
        super().__init__(*args, **kwargs)
        if self.use_all2all:
            self.all2all_manager = AgRsAll2AllManager(self.cpu_group)  # type: ignore[no-untyped-call]

    def all_gatherv(
        self, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> Tensor | list[Tensor]:
        """The ranks' tensors joined along dim 0, `sizes[r]` rows of rank r.

        Raises:
            ValueError: another dim.
        """
        if dim != 0:
            raise ValueError(f"dim={dim}: must be 0")
        if isinstance(input_, list):
            return [self._gather_rows(x, sizes) for x in input_]
        return self._gather_rows(input_, sizes)

    def _gather_rows(self, x: Tensor, sizes: list[int] | None) -> Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return self.all_gather(x, 0)
        longest = max(sizes)
        gathered = self.all_gather(_padded(x, longest), 0)
        return torch.cat([part[:size] for part, size in zip(torch.split(gathered, longest), sizes, strict=True)])

    def reduce_scatterv(self, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
        """The sum over ranks along dim 0, of which this rank gets its `sizes[rank]` rows.

        Raises:
            ValueError: another dim.
        """
        if dim != 0:
            raise ValueError(f"dim={dim}: must be 0")
        if sizes is None or len(set(sizes)) == 1:
            return self.reduce_scatter(input_, 0)
        longest = max(sizes)
        parts = torch.cat([_padded(part, longest) for part in torch.split(input_, sizes)])
        return self.reduce_scatter(parts, 0)[: sizes[self.rank_in_group]]

    def dispatch_router_logits(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states and router logits of all ranks; see vLLM's manager."""
        return self._manager().dispatch_router_logits(*args, **kwargs)

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states, weights and expert ids of all ranks; see vLLM's manager."""
        return self._manager().dispatch(*args, **kwargs)

    def combine(self, hidden_states: Tensor, is_sequence_parallel: bool = False) -> Tensor:
        """Each rank's tokens, summed over the ranks."""
        combined: Tensor = self._manager().combine(hidden_states, is_sequence_parallel)
        return combined

    def _manager(self) -> Any:
        assert self.all2all_manager is not None  # vLLM asks the expert parallel group alone
        return self.all2all_manager


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - x.shape[0]))
