# SPDX-License-Identifier: Apache-2.0
"""Checksums of experts: every slot must hold its expert, whole, after each change.

Legend: M MoE layers, R ranks, K slots of a rank, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from ascend_comm import CommGroup
from ascend_eplb import Placement
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Checksums", "slot_checksums"]

_MODULUS_OF_WEIGHTS = 8191  # a prime: bytes that change places, or lie in another tensor, change the sum


def slot_checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """int64 `[K]`: a weighted sum of the bytes of all tensors of each slot."""
    total: Tensor | None = None
    for number, values in enumerate(tensors.values()):
        octets = values.flatten(1).view(torch.uint8).to(torch.int64)
        weights = torch.arange(1, octets.shape[1] + 1, device=values.device) % _MODULUS_OF_WEIGHTS + 1
        part = (octets * weights).sum(dim=1) * (2 * number + 1)
        total = part if total is None else total + part
    assert total is not None
    return total


class Checksums:
    """The checksum of each expert, from the slots that hold it at first.

    Args:
        placed: the placement in force.
        layers: the tensors of each of M layers on this rank.
        group: the ranks. All of them build this together.

    Raises:
        RuntimeError: replicas of an expert that differ.
    """

    def __init__(self, placed: Placement, layers: Sequence[Mapping[str, Tensor]], group: CommGroup) -> None:
        """Gather the checksums of all slots."""
        self._layers, self._rank = layers, group.rank_in_group
        here = torch.stack([slot_checksums(tensors) for tensors in layers])
        everywhere = group.all_gather(here, 0).view(group.world_size, *here.shape).cpu().numpy()
        self._expected = np.zeros((placed.layers, placed.num_experts), np.int64)
        rows = np.arange(placed.layers)[:, None, None]
        self._expected[rows, placed.physical_to_logical] = everywhere.transpose(1, 0, 2)
        for layer in range(placed.layers):
            for rank in range(placed.ranks):
                self._compare(layer, placed.physical_to_logical[layer, rank], everywhere[rank, layer], rank)

    def check(self, layer: int, experts: NDArray[np.int32]) -> None:
        """Compare every slot of a layer on this rank with its expert `[K]`.

        Raises:
            RuntimeError: a slot that holds something else; names layer, rank, slot and expert.
        """
        found = slot_checksums(self._layers[layer]).cpu().numpy()
        self._compare(layer, experts, found, self._rank)

    def _compare(self, layer: int, experts: NDArray[np.int32], found: NDArray[np.int64], rank: int) -> None:
        wrong = np.flatnonzero(found != self._expected[layer, experts])
        if len(wrong):
            raise RuntimeError(
                f"dynamic EPLB: slot {wrong[0]} of rank {rank} in MoE layer {layer} does not hold the weights of expert {experts[wrong[0]]}"
            )
