# SPDX-License-Identifier: Apache-2.0
"""The problem that a balancing policy solves, and the function type of policies.

Legend: L layers, E logical experts, R ranks, K slots per rank, S = R * K slots, N nodes, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ascend_eplb.limits import MOST_HELD, MOST_SLOTS, check_limit
from ascend_eplb.metrics import FloatArray, as_load
from ascend_eplb.placement import Placement

__all__ = ["Policy", "Problem"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A load to be balanced, and the constraints of the answer.

    Args:
        load: `[L, E]`, finite and not negative; kept as float64.
        ranks: R.
        slots: S, over all ranks: R divides S, E <= S and S / R <= E.
        nodes: N, which divides R.
        groups: G expert groups of E / G contiguous experts. Where N > 1 and N divides G, a group and all its replicas
            stay within one node; where N does not divide G, groups and nodes are ignored (as the published algorithm
            does).
        previous: the placement in force. `incremental` and `swift` start from it; every answer keeps the experts that
            stay on a rank in their slots.
        max_moves: the most slots that may receive new weights, over all layers. Needs `previous` and a policy that
            can keep to it (`incremental`, `swift`).
        max_moves_per_layer: the same for each layer.
        max_replicas: the most replicas of one expert (there are never more than R). 0 means R.
        target: part of the best possible balancedness (`best_balancedness`) at which `incremental` and `swift` stop
            moving.

    Raises:
        TypeError, ValueError: anything outside of that; the message names the argument, its value and what is allowed.
    """

    load: FloatArray
    ranks: int
    slots: int
    nodes: int = 1
    groups: int = 1
    previous: Placement | None = None
    max_moves: int | None = None
    max_moves_per_layer: int | None = None
    max_replicas: int = 0
    target: float = 0.982

    def __post_init__(self) -> None:
        """Check all arguments, so that policies need not."""
        load_LE = as_load(self.load)
        load_LE.flags.writeable = False
        object.__setattr__(self, "load", load_LE)
        for name in ("ranks", "slots", "nodes", "groups", "max_replicas", "max_moves", "max_moves_per_layer"):
            value = getattr(self, name)
            if value is None and name.startswith("max_moves"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer, not {value!r}")
            object.__setattr__(self, name, int(value))
        for name in ("ranks", "slots", "nodes", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self._check_sizes()
        self._check_limits()
        if self.previous is not None:
            if not isinstance(self.previous, Placement):
                raise TypeError(f"previous must be a Placement, not {type(self.previous).__name__}")
            self._check_previous(self.previous)

    def _check_sizes(self) -> None:
        experts = self.num_experts
        if self.slots % self.ranks:
            raise ValueError(f"slots={self.slots} must be a multiple of ranks={self.ranks}")
        if self.slots < experts:
            raise ValueError(f"slots={self.slots} cannot hold {experts} experts")
        if self.slots // self.ranks > experts:
            raise ValueError(
                f"slots={self.slots} gives each of ranks={self.ranks} {self.slots // self.ranks} slots for {experts} "
                f"experts, which forces two replicas of one on a rank; at most slots={experts * self.ranks} is possible"
            )
        given = f"layers={self.layers}, ranks={self.ranks}, slots={self.slots}"
        check_limit(given, self.layers * self.slots, MOST_SLOTS, "slots over all layers")
        check_limit(
            f"{given}, experts={experts}", self.layers * self.ranks * experts, MOST_HELD, "layers x ranks x experts"
        )
        if self.ranks % self.nodes:
            raise ValueError(f"nodes={self.nodes} must divide ranks={self.ranks}")
        if experts % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {experts} experts")
        if self.hierarchical and self.slots_per_rank > experts // self.nodes:
            raise ValueError(
                f"slots={self.slots} gives each rank {self.slots_per_rank} slots, but with nodes={self.nodes} and "
                f"groups={self.groups} a node holds only {experts // self.nodes} different experts"
            )

    def _check_limits(self) -> None:
        for name in ("max_moves", "max_moves_per_layer"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
            if value is not None and self.previous is None:
                raise ValueError(f"{name}={value} needs the previous placement that moves are counted from")
        if not 0 < self.target <= 1:
            raise ValueError(f"target={self.target} must be in (0, 1]")
        if self.max_replicas < 0:
            raise ValueError(f"max_replicas={self.max_replicas} must be at least 1, or 0 for no limit")
        if self.max_replicas and self.max_replicas * self.num_experts < self.slots:
            raise ValueError(
                f"max_replicas={self.max_replicas} of {self.num_experts} experts cannot fill slots={self.slots}"
            )

    def _check_previous(self, previous: Placement) -> None:
        mine = (self.layers, self.num_experts, self.ranks, self.slots)
        theirs = (previous.layers, previous.num_experts, previous.ranks, previous.slots)
        if mine != theirs:
            raise ValueError(f"previous has (layers, experts, ranks, slots) = {theirs}, the problem {mine}")

    @property
    def layers(self) -> int:
        """L."""
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """K = S / R."""
        return self.slots // self.ranks

    @property
    def hierarchical(self) -> bool:
        """Whether groups are bound to nodes."""
        return self.nodes > 1 and self.groups % self.nodes == 0

    @property
    def replica_cap(self) -> int:
        """The most replicas of one expert: ranks of its domain, or `max_replicas` where that is less."""
        domain = self.ranks // self.nodes if self.hierarchical else self.ranks
        return min(domain, self.max_replicas or domain)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The layer numbers of `previous`, or none."""
        return self.previous.layer_ids if self.previous is not None else ()


Policy = Callable[[Problem], Placement]
