# SPDX-License-Identifier: Apache-2.0
"""`eplb_config`: the options of expert placement, under the names that the public plugin uses. Each value is checked on its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vllm_ascend.findings import refuse, shown

__all__ = ["LAYOUTS", "POLICIES", "POLICY_NUMBERS", "STAGES", "WEIGHTINGS", "EplbConfig"]

LAYOUTS = ("spread", "checkpoint")
POLICIES = ("incremental", "balanced", "swift", "deepseek", "random")
STAGES = ("all", "prefill", "decode")
WEIGHTINGS = ("mean", "decayed", "peak")
# The public plugin's numbers of `eplb_policy_type`. Its third one, FlashLB, plans for a mean and a variance: nearest is "balanced" with load_weighting "peak".
POLICY_NUMBERS: Mapping[int, str] = MappingProxyType({0: "random", 1: "deepseek", 2: "swift", 3: "balanced"})


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbConfig:
    """`eplb_config`: on which rank each expert lies, and whether experts move while the engine runs.

    Args:
        expert_map_path: a placement file in any format of ascend-eplb; "": `layout` says where experts lie.
        num_redundant_experts: slots beyond one for each expert, in each layer; with a file, what the file has, or 0.
        layout: "spread" or "checkpoint" (an option of this plugin alone); see ascend-eplb.
        expert_load_record_path: where rank 0 writes how many tokens each expert got, .jsonl, .npz, .npy or .json; "": nowhere (of this plugin alone).
        expert_heat_collection_interval: steps that one entry of that file sums up, and after which a plan is made.
        dynamic_eplb: whether experts move while the engine runs. The options below are for that alone.
        algorithm_execution_interval: steps after which the ranks ask whether the plan is there, and between the times that they ask.
        eplb_policy_type: a policy of ascend-eplb, or "random"; a number of the public plugin stands for one of these.
        eplb_heat_collection_stage: tokens that count: "all", "prefill" or "decode".
        load_collection_phase: an older name of the same; "": not given.
        expert_map_record_path: where rank 0 writes the placement in force after each rebalance and at the end, .json; "": nowhere.
        load_weighting: how the intervals of a window become one load: "mean", "decayed" or "peak" (of this plugin alone).
        load_window: intervals that a plan is made from (of this plugin alone).
        move_budget: the part of all slots that may get new weights in one rebalance, with "incremental" and "swift" (of this plugin alone).
        move_buffer_experts: experts that a rank receives at once, for which it sets memory aside (of this plugin alone).
        verify_moves: whether the checksums of a layer's slots are compared after each change, for which steps wait (of this plugin alone).
    """

    expert_map_path: str = ""
    num_redundant_experts: int = 0
    layout: str = "spread"
    expert_load_record_path: str = ""
    expert_heat_collection_interval: int = 400
    dynamic_eplb: bool = False
    algorithm_execution_interval: int = 30
    eplb_policy_type: str = "incremental"
    eplb_heat_collection_stage: str = "all"
    load_collection_phase: str = ""
    expert_map_record_path: str = ""
    load_weighting: str = "decayed"
    load_window: int = 4
    move_budget: float = 0.15
    move_buffer_experts: int = 2
    verify_moves: bool = False

    def __post_init__(self) -> None:
        """Check what needs neither the model nor the ranks."""
        refuse(self._broken_rules())

    @property
    def in_force(self) -> EplbConfig:
        """The options without those that have no effect: where nothing moves, how it would move."""
        if self.dynamic_eplb:
            return self
        kept = (
            "expert_map_path", "num_redundant_experts", "layout", "expert_load_record_path", "expert_map_record_path",
            "expert_heat_collection_interval",
        )  # fmt: skip
        return EplbConfig(**{name: getattr(self, name) for name in kept})

    @property
    def stage(self) -> str:
        """The tokens that count, by whichever of its two names was given."""
        return self.load_collection_phase or self.eplb_heat_collection_stage

    def _broken_rules(self) -> Iterator[str]:
        path = "option 'eplb_config."
        if self.layout not in LAYOUTS:
            yield f"{path}layout' ({shown(self.layout)}) must be one of {', '.join(LAYOUTS)}"
        elif self.expert_map_path and self.layout != LAYOUTS[0]:
            yield f"{path}layout' ({self.layout!r}) cannot be used with expert_map_path: the file says where experts lie"
        if self.expert_load_record_path and not self.expert_load_record_path.endswith(
            (".jsonl", ".npz", ".npy", ".json")
        ):
            yield f"{path}expert_load_record_path' ({self.expert_load_record_path!r}) must end in .jsonl, .npz, .npy or .json"
        if self.expert_map_record_path and not self.expert_map_record_path.endswith(".json"):
            yield f"{path}expert_map_record_path' ({self.expert_map_record_path!r}) must end in .json"
        for name in (
            "expert_heat_collection_interval",
            "algorithm_execution_interval",
            "load_window",
            "move_buffer_experts",
        ):
            if (value := getattr(self, name)) < 1:
                yield f"{path}{name}' ({value}) must be 1 or more"
        for name, allowed in (
            ("eplb_heat_collection_stage", STAGES),
            ("load_collection_phase", ("", *STAGES)),
            ("load_weighting", WEIGHTINGS),
        ):
            if (given := getattr(self, name)) not in allowed:
                yield f"{path}{name}' ({shown(given)}) must be one of {', '.join(filter(None, allowed))}"
        if self.eplb_policy_type not in POLICIES:
            yield (
                f"{path}eplb_policy_type' ({shown(self.eplb_policy_type)}) must be one of {', '.join(POLICIES)}, or a number of the public plugin: "
                + ", ".join(f"{number} ({name})" for number, name in POLICY_NUMBERS.items())
            )
        if "" != self.load_collection_phase != self.eplb_heat_collection_stage != "all":
            yield (
                f"{path}load_collection_phase' ({self.load_collection_phase!r}) is an older name of eplb_heat_collection_stage, which is "
                f"{self.eplb_heat_collection_stage!r}; give one of them"
            )
        if not self.move_budget > 0:
            yield f"{path}move_budget' ({self.move_budget}) must be above 0 and at most 1"
