# SPDX-License-Identifier: Apache-2.0
"""`MoeEnv`: the groups and the number of slots, which do not change in a run."""

from dataclasses import dataclass, field

from ascend_comm import CommGroup, Solo

from ascend_moe.choose import Soc

__all__ = ["MoeEnv"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeEnv:
    """The groups over which a layer's experts are shared and over which its tokens are distributed before it.

    Args:
        ep: the ranks that share the slots, in the order of their slots: rank r has slots r * L to (r + 1) * L - 1. vLLM's
            order, data parallel rank times TP size plus TP rank. `Solo()` without expert parallelism.
        num_slots: S, physical slots of all ranks of `ep`: logical experts and their redundant replicas.
        tp: the ranks that have the same tokens as this one.
        dp: the ranks of the same TP rank in each data parallel replica; each has different tokens.
        mc2: a second communicator of the ranks of `ep`, used by MC2's kernels only; None: MC2 is not available.
        soc: the chip; the arguments of MC2's kernels depend on it.
        sequence_parallel: each rank of `ep` already has tokens of its own, and `tp` plays no part.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    ep: CommGroup
    num_slots: int
    tp: CommGroup = field(default_factory=Solo)
    dp: CommGroup = field(default_factory=Solo)
    mc2: CommGroup | None = None
    soc: Soc = Soc.A3
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        ranks = self.ep.world_size
        if self.num_slots < 1 or self.num_slots % ranks:
            raise ValueError(f"num_slots={self.num_slots} must be a positive multiple of the {ranks} ranks of ep")
        if ranks > 1 and self.tp.world_size * self.dp.world_size != ranks:
            raise ValueError(
                f"ep has {ranks} ranks and must have as many as tp times dp, "
                f"{self.tp.world_size} * {self.dp.world_size}"
            )
        if self.mc2 is not None and list(self.mc2.ranks) != list(self.ep.ranks):
            raise ValueError(f"mc2 of ranks {list(self.mc2.ranks)} must have the ranks of ep, {list(self.ep.ranks)}")

    @property
    def slots_per_rank(self) -> int:
        """L."""
        return self.num_slots // self.ep.world_size

    @property
    def token_sharing_group(self) -> CommGroup:
        """The ranks that have the same tokens and may slice them: `tp`; under sequence parallelism this rank alone."""
        return Solo(self.ep.ranks[self.ep.rank_in_group]) if self.sequence_parallel else self.tp
