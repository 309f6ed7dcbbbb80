# SPDX-License-Identifier: Apache-2.0
"""From `eplb_config` to a Placement, and from that to what one rank needs for each MoE layer. No vLLM, no torch.

Legend: M MoE layers of the model, counted over all pipeline stages, E logical experts, R ranks, K slots per rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ascend_eplb import (
    Cluster,
    Placement,
    checkpoint,
    expert_map,
    load_placement,
    log2phy_balanced,
    routing_table,
    select_layers,
    spread,
)
from ascend_eplb.placement import IntArray

from vllm_ascend.config import EplbConfig
from vllm_ascend.deployment import Deployment
from vllm_ascend.findings import found_by

__all__ = ["ExpertPlacement", "LayerSlots", "broken", "placement_of"]

_LAYOUTS = {"spread": spread, "checkpoint": checkpoint}
_MOST_TABLE_ROWS = 64


def broken(config: EplbConfig, deployment: Deployment) -> Iterator[str]:
    """One finding for each rule of `eplb_config` that is broken, naming the option, its value and what is allowed.

    The placement itself, and with it the map file, is checked where nothing else is wrong.
    """
    found = list(_broken_rules(config, deployment))
    yield from found
    if deployment.model.moe.routed_experts and not found:
        yield from found_by(lambda: placement_of(config, deployment))


def placement_of(config: EplbConfig, deployment: Deployment) -> Placement:
    """Where the experts of a MoE model lie. Layer i of it is the model's i-th MoE layer, as in the public plugin's map files.

    Raises:
        ValueError: a file that cannot be read or does not fit the model and the ranks; slots that do not divide over the ranks.
    """
    model, ranks = deployment.model, deployment.expert_ranks
    experts, layers = model.moe.routed_experts, max(len(model.moe_layer_ids), 1)
    if config.expert_map_path:
        return _from_file(config, experts=experts, ranks=ranks, layers=layers)
    try:
        return _LAYOUTS[config.layout](
            num_experts=experts, ranks=ranks, redundant=config.num_redundant_experts, layers=layers
        )
    except ValueError as error:
        raise ValueError(
            f"option 'eplb_config.num_redundant_experts' ({config.num_redundant_experts}): {error}"
        ) from None


def _from_file(config: EplbConfig, *, experts: int, ranks: int, layers: int) -> Placement:
    option = f"option 'eplb_config.expert_map_path' ({config.expert_map_path!r})"
    try:
        placement = load_placement(config.expert_map_path, ranks=ranks, num_experts=experts)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{option}, for {experts} experts over {ranks} ranks: {error}") from None
    if config.num_redundant_experts not in (0, placement.redundant):
        raise ValueError(
            f"option 'eplb_config.num_redundant_experts' ({config.num_redundant_experts}) must be 0 or "
            f"{placement.redundant}, as in the file {config.expert_map_path!r}"
        )
    if not any(layer < layers for layer in placement.layer_ids):
        raise ValueError(
            f"{option} has layers {placement.layer_ids[0]} to {placement.layer_ids[-1]}; the model's are 0 to {layers - 1}"
        )
    return select_layers(placement, layers)


def _broken_rules(config: EplbConfig, deployment: Deployment) -> Iterator[str]:
    top, record = deployment.topology, config.expert_load_record_path
    if not deployment.model.moe.routed_experts:
        if config != EplbConfig():
            yield f"option 'eplb_config' ({_given(config)}) needs a MoE model"
        return
    for name in ("expert_map_path", "num_redundant_experts"):
        if (value := getattr(config, name)) and not deployment.expert_parallel:
            yield f"option 'eplb_config.{name}' ({value!r}) needs enable_expert_parallel"
    if deployment.expert_parallel and deployment.round_robin_experts:
        yield "expert_placement_strategy ('round_robin') is not supported; leave it at 'linear' and give 'eplb_config.expert_map_path'"
    if record and top.pipeline_parallel > 1:
        yield f"option 'eplb_config.expert_load_record_path' ({record!r}) needs pipeline_parallel_size 1, got {top.pipeline_parallel}"
    if record and not os.access(Path(record).parent, os.W_OK):
        yield f"option 'eplb_config.expert_load_record_path' ({record!r}) must lie in a folder that exists and can be written to"


def _given(config: EplbConfig) -> dict[str, object]:
    """What differs from the defaults."""
    names, defaults = EplbConfig.__slots__, EplbConfig()
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(defaults, name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSlots:
    """One MoE layer as one rank sees it.

    Attributes:
        placed: the layer's own placement, of one layer.
        expert_map: int32 `[E]`, the slot of each expert on this rank, or -1.
        log2phy: int32 `[E]`, the slot among those of all ranks that serves each expert for tokens of this rank alone; None: slot e for expert e.
        routing_table: int32 `[P, E]`, the same by token, for tokens that several ranks have; None: as `log2phy`, which is the same on all ranks then.
    """

    placed: Placement
    expert_map: IntArray
    log2phy: IntArray | None
    routing_table: IntArray | None

    @property
    def num_slots(self) -> int:
        """R * K."""
        return self.placed.slots


class ExpertPlacement:
    """The placement of a model on one rank.

    Args:
        placement: of the M layers.
        layout: for layers beyond them, and for those with another number of experts.
        moe_layer_ids: their numbers among all decoder layers.
        rank: this one among the R.
        tp_size: tensor parallel size; it divides R.
        replica: data parallel rank, which starts at another row of routing tables: replicas of an expert are used evenly however few tokens
            each has.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        layout: str,
        moe_layer_ids: tuple[int, ...],
        rank: int,
        tp_size: int,
        replica: int,
    ) -> None:
        """Choose replicas for all layers at once."""
        self.placement = placement
        self._layout, self._layer_ids, self._rank, self._replica = layout, moe_layer_ids, rank, replica
        self._cluster = Cluster(ranks=placement.ranks, tp_size=tp_size if placement.ranks % tp_size == 0 else 1)
        self._nearest = self._nearest_replicas(placement)

    def layer(self, decoder_layer: int, num_experts: int) -> LayerSlots:
        """The slots of a decoder layer.

        Raises:
            ValueError: experts that do not divide over the ranks.
        """
        if decoder_layer in self._layer_ids and num_experts == self.placement.num_experts:
            index = self._layer_ids.index(decoder_layer)
            one = Placement(self.placement.physical_to_logical[index : index + 1], num_experts)
            return self._slots(one, self._nearest[index])
        build, (ranks, redundant) = _LAYOUTS[self._layout], (self.placement.ranks, self.placement.redundant)
        one = build(num_experts=num_experts, ranks=ranks, redundant=redundant)
        return self._slots(one, self._nearest_replicas(one)[0])

    def _nearest_replicas(self, placement: Placement) -> IntArray:
        even = np.ones((placement.layers, placement.num_experts))
        return np.asarray(log2phy_balanced(placement, even, self._cluster)[self._rank])

    def _slots(self, one: Placement, nearest: IntArray) -> LayerSlots:
        is_identity = not one.redundant and np.array_equal(nearest, np.arange(one.num_experts))
        return LayerSlots(
            placed=one,
            expert_map=expert_map(one, self._rank)[0],
            log2phy=None if is_identity else nearest,
            routing_table=self._table(one) if one.redundant else None,
        )

    def _table(self, one: Placement) -> IntArray:
        rows = min(math.lcm(*np.unique(one.replicas).tolist()), _MOST_TABLE_ROWS)
        return np.roll(routing_table(one, rows)[0], -self._replica, axis=0)
