# SPDX-License-Identifier: Apache-2.0
"""From `eplb_config` to a Placement, and from that to what one rank needs for each MoE layer. No vLLM, no torch.

Legend: E logical experts, R ranks, K slots per rank.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ascend_eplb import (
    Cluster,
    LayerMatch,
    Placement,
    checkpoint,
    expert_map,
    fit_layers,
    load_placement,
    log2phy_balanced,
    routing_table,
    spread,
    usual_numbering,
)
from ascend_eplb.placement import IntArray
from ascend_eplb.ranges import as_ranges

from vllm_ascend.deployment import Deployment
from vllm_ascend.eplb.options import EplbConfig
from vllm_ascend.findings import found_by

__all__ = ["ExpertPlacement", "LayerSlots", "broken", "placement_of"]

_LAYOUTS = {"spread": spread, "checkpoint": checkpoint}
_MOST_TABLE_ROWS = 64
_logger = logging.getLogger("vllm.vllm_ascend")  # a child of vLLM's logger, whose handler and level the user sets


def broken(config: EplbConfig, deployment: Deployment) -> Iterator[str]:
    """One finding for each rule of `eplb_config` that is broken, naming the option, its value and what is allowed.

    The placement itself, and with it the map file, is checked where nothing else is wrong.
    """
    found = list(_broken_rules(config, deployment))
    yield from found
    if found or not deployment.model.moe.routed_experts:
        return
    if config.expert_map_path:
        yield from found_by(lambda: _log_match(config, _from_file(config, deployment)[1]))
    else:
        yield from found_by(lambda: placement_of(config, deployment))


def placement_of(config: EplbConfig, deployment: Deployment) -> Placement:
    """Where the experts of a MoE model lie. Its layers have the numbers of the decoder layers that are MoE layers, over all pipeline stages.

    Raises:
        ValueError: a file that cannot be read or does not fit the model and the ranks; slots that do not divide over the ranks.
    """
    if config.expert_map_path:
        return _from_file(config, deployment)[0]
    model = deployment.model
    try:
        one = _LAYOUTS[config.layout](
            num_experts=model.moe.routed_experts, ranks=deployment.expert_ranks, redundant=config.num_redundant_experts
        )
    except ValueError as error:
        raise ValueError(
            f"option 'eplb_config.num_redundant_experts' ({config.num_redundant_experts}): {error}"
        ) from None
    layers = model.moe_layer_ids or (0,)
    return Placement(np.repeat(one.physical_to_logical, len(layers), axis=0), one.num_experts, layers)


def _from_file(config: EplbConfig, deployment: Deployment) -> tuple[Placement, LayerMatch]:
    """The placement of the model's MoE layers that the file holds, and how its layer numbers were read."""
    option = f"option 'eplb_config.expert_map_path' ({config.expert_map_path!r})"
    experts, ranks, layers = (
        deployment.model.moe.routed_experts,
        deployment.expert_ranks,
        deployment.model.moe_layer_ids,
    )
    try:
        placement = load_placement(config.expert_map_path, ranks=ranks, num_experts=experts)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{option}, for {experts} experts over {ranks} ranks: {error}") from None
    if config.num_redundant_experts not in (0, placement.redundant):
        raise ValueError(
            f"option 'eplb_config.num_redundant_experts' ({config.num_redundant_experts}) must be 0 or "
            f"{placement.redundant}, as in the file {config.expert_map_path!r}"
        )
    if not layers:
        raise ValueError(
            f"{option}: vllm-ascend cannot tell which decoder layers of this model are MoE layers, so no layer of a file "
            "can be given to one of them; leave the option out"
        )
    try:
        return fit_layers(placement, layers, usual=usual_numbering(config.expert_map_path))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _log_match(config: EplbConfig, match: LayerMatch) -> None:
    """Say once, before the workers start, how the file's layer numbers were read."""
    level = logging.WARNING if match.lacking or match.unused else logging.INFO
    _logger.log(level, "eplb_config.expert_map_path %r: %s", config.expert_map_path, match)


def _broken_rules(config: EplbConfig, deployment: Deployment) -> Iterator[str]:
    top, record = deployment.topology, config.expert_load_record_path
    if not deployment.model.moe.routed_experts:
        if config.in_force != EplbConfig():
            yield f"option 'eplb_config' ({_given(config.in_force)}) needs a MoE model"
        return
    for name in ("expert_map_path", "num_redundant_experts"):
        if (value := getattr(config, name)) and not deployment.expert_parallel:
            yield f"option 'eplb_config.{name}' ({value!r}) needs enable_expert_parallel"
    if deployment.expert_parallel and deployment.round_robin_experts:
        yield "expert_placement_strategy ('round_robin') is not supported; leave it at 'linear' and give 'eplb_config.expert_map_path'"
    yield from _broken_dynamic_rules(config, deployment)
    if record and top.pipeline_parallel > 1:
        yield f"option 'eplb_config.expert_load_record_path' ({record!r}) needs pipeline_parallel_size 1, got {top.pipeline_parallel}"
    if record and config.expert_map_path and Path(record).resolve() == Path(config.expert_map_path).resolve():
        yield (
            f"option 'eplb_config.expert_load_record_path' ({record!r}) names the file of 'eplb_config.expert_map_path', which the record would replace; "
            "name another file"
        )
    if record and not os.access(Path(record).parent, os.W_OK):
        yield f"option 'eplb_config.expert_load_record_path' ({record!r}) must lie in a folder that exists and can be written to"


def _broken_dynamic_rules(config: EplbConfig, deployment: Deployment) -> Iterator[str]:
    """What experts that move while the engine runs ask of the model and the ranks, and of the other options."""
    top, option, record = (
        deployment.topology,
        "option 'eplb_config.dynamic_eplb' (True)",
        config.expert_map_record_path,
    )
    if record and not config.dynamic_eplb:
        yield (
            f"option 'eplb_config.expert_map_record_path' ({record!r}) needs dynamic_eplb; expert_load_record_path records the load of the experts "
            "without it"
        )
    if record and not os.access(Path(record).parent, os.W_OK):
        yield f"option 'eplb_config.expert_map_record_path' ({record!r}) must lie in a folder that exists and can be written to"
    if not config.dynamic_eplb:
        return
    if not deployment.expert_parallel:
        yield f"{option} needs enable_expert_parallel"
    elif deployment.expert_ranks == 1:
        yield f"{option} needs several ranks that share the experts, got 1: raise tensor_parallel_size or data_parallel_size"
    if top.pipeline_parallel > 1:
        yield f"{option} needs pipeline_parallel_size 1, got {top.pipeline_parallel}: the stages would not change their placements in the same step"
    if config.expert_load_record_path:
        yield (
            f"{option} cannot be used with expert_load_record_path ({config.expert_load_record_path!r}), which records slots of one placement; "
            "leave one of the two out"
        )


def _given(config: EplbConfig) -> dict[str, object]:
    """The options whose values are not the defaults."""
    names, defaults = EplbConfig.__slots__, EplbConfig()
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(defaults, name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSlots:
    """One MoE layer as one rank sees it.

    Attributes:
        placed: the layer's own placement, of one layer.
        expert_map: int32 `[E]`, the slot of each expert on this rank, or -1.
        log2phy: int32 `[E]`, for tokens that only this rank has: the slot, among those of all ranks, that serves each expert. None: slot e serves expert e.
        routing_table: int32 `[P, E]`, the same for tokens that several ranks have: the token at position t uses row t % P. None: `log2phy` serves for these
            too, because it is then equal on all ranks.
    """

    placed: Placement
    expert_map: IntArray
    log2phy: IntArray | None
    routing_table: IntArray | None

    @property
    def num_slots(self) -> int:
        """R * K, the slots of all ranks."""
        return self.placed.slots


class ExpertPlacement:
    """The placement of a model on one rank.

    Args:
        placement: of the MoE layers that the model's config tells, numbered as decoder layers.
        options: `eplb_config`. Its `layout` is for layers that `placement` lacks and for those with another number of experts; with an
            `expert_map_path` only layers after the model's own (drafts) may take it.
        decoder_layers: how many the model has; 0 where unknown.
        rank: the number of this rank, from 0 to R - 1.
        tp_size: tensor parallel size; it divides R.
        replica: data parallel rank. Each starts at another row of the routing tables, so that the replicas of an expert are used evenly even if every
            data parallel rank has few tokens.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        options: EplbConfig,
        decoder_layers: int,
        rank: int,
        tp_size: int,
        replica: int,
    ) -> None:
        """Choose replicas for all layers at once."""
        self.placement = placement
        self._options, self._decoder_layers, self._rank, self._replica = options, decoder_layers, rank, replica
        self._cluster = Cluster(ranks=placement.ranks, tp_size=tp_size if placement.ranks % tp_size == 0 else 1)
        self._nearest = self._nearest_replicas(placement)

    def layer(self, decoder_layer: int, num_experts: int) -> LayerSlots:
        """The slots of a decoder layer.

        Raises:
            ValueError: a layer of the model that is not in a placement from a file; experts that do not divide over the ranks.
        """
        if decoder_layer in self.placement.layer_ids and num_experts == self.placement.num_experts:
            index = self.placement.layer_ids.index(decoder_layer)
            one = Placement(self.placement.physical_to_logical[index : index + 1], num_experts)
            return self._slots(one, self._nearest[index])
        is_draft = 0 < self._decoder_layers <= decoder_layer
        if self._options.expert_map_path and not is_draft:
            raise ValueError(
                f"option 'eplb_config.expert_map_path' ({self._options.expert_map_path!r}) cannot be followed: decoder layer {decoder_layer} "
                f"has {num_experts} experts, but the model's config tells of {self.placement.num_experts} experts in decoder layers "
                f"{as_ranges(self.placement.layer_ids)} only; leave the option out"
            )
        build, (ranks, redundant) = _LAYOUTS[self._options.layout], (self.placement.ranks, self.placement.redundant)
        one = build(num_experts=num_experts, ranks=ranks, redundant=redundant)
        return self._slots(one, self._nearest_replicas(one)[0])

    def moved(self, one: Placement) -> LayerSlots:
        """The slots of a layer that has got another placement while the engine runs."""
        return self._slots(one, self._nearest_replicas(one)[0])

    def _nearest_replicas(self, placement: Placement) -> IntArray:
        even = np.ones((placement.layers, placement.num_experts))
        return np.asarray(log2phy_balanced(placement, even, self._cluster)[self._rank])

    def _slots(self, one: Placement, nearest: IntArray) -> LayerSlots:
        # Tensors are there for good, and of one shape, where the placement may change in a running engine.
        is_identity = not (self._options.dynamic_eplb or one.redundant) and np.array_equal(
            nearest, np.arange(one.num_experts)
        )
        return LayerSlots(
            placed=one,
            expert_map=expert_map(one, self._rank)[0],
            log2phy=None if is_identity else nearest,
            routing_table=self._table(one) if one.redundant else None,
        )

    def _table(self, one: Placement) -> IntArray:
        exact = math.lcm(*np.unique(one.replicas).tolist())
        rows = _MOST_TABLE_ROWS if self._options.dynamic_eplb else min(exact, _MOST_TABLE_ROWS)
        return np.roll(routing_table(one, rows)[0], -self._replica, axis=0)
