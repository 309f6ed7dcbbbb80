# SPDX-License-Identifier: Apache-2.0
"""How ranks are distributed over nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cluster"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Ranks 0..R-1 in equal contiguous nodes.

    Args:
        ranks: R >= 1.
        nodes: number of nodes, which divides R.
        tp_size: tensor-parallel size of the attention in front of the experts, which divides R. Only the
            classic `log2phy` rule depends on it.

    Raises:
        TypeError: not an integer.
        ValueError: a number below 1 or one that does not divide.
    """

    ranks: int
    nodes: int = 1
    tp_size: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("ranks", "nodes", "tp_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer, not {value!r}")
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks} must be at least 1")
        for name in ("nodes", "tp_size"):
            value = getattr(self, name)
            if value < 1 or self.ranks % value:
                raise ValueError(f"{name}={value} must divide ranks={self.ranks}")

    @property
    def ranks_per_node(self) -> int:
        """R / nodes."""
        return self.ranks // self.nodes

    def node_of(self) -> NDArray[np.int64]:
        """int64 `[R]`: the node of each rank."""
        return np.arange(self.ranks) // self.ranks_per_node
