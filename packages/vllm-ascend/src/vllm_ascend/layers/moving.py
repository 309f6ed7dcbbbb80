# SPDX-License-Identifier: Apache-2.0
"""Dynamic EPLB for the MoE layers of a model: they are handed to `eplb/rebalance.py`."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial

from ascend_eplb import Placement
from torch import nn
from vllm.model_executor.models.utils import extract_layer_index

from vllm_ascend import envs, parallel
from vllm_ascend.eplb.client import Planner
from vllm_ascend.eplb.metrics import StatusSender
from vllm_ascend.eplb.move import MovableLayer, NoMemoryError
from vllm_ascend.eplb.rebalance import PLAN_SECONDS, Rebalancer
from vllm_ascend.experts import MoeContext
from vllm_ascend.layers.moe import AscendRoutedExperts

__all__ = ["rebalancer", "refuse_to_reload"]

_logger = logging.getLogger("vllm.vllm_ascend")


def rebalancer(model: nn.Module, model_name: str) -> Rebalancer | None:
    """Dynamic EPLB of a model whose weights are loaded. All ranks call it together.

    Args:
        model: the model.
        model_name: under which it is served, for metrics.

    Returns:
        None where `eplb_config` does not ask for it, and where some rank has no memory for the buffers: experts then stay where they are, which is
        logged.

    Raises:
        ValueError: layers that differ in their numbers of experts or have tensors that cannot be moved.
    """
    shared = parallel.current()
    layers = [module for module in model.modules() if isinstance(module, AscendRoutedExperts)]
    if shared is None or shared.moe is None or shared.moe.groups.moves is None or not layers:
        return None
    options, group = shared.moe.options, shared.moe.groups.moves
    with ExitStack() as unless_experts_move:
        planner = sender = None
        if group.rank_in_group == 0:
            planner = Planner(window=options.load_window, seconds=PLAN_SECONDS)
            unless_experts_move.callback(planner.close)
            if address := envs.eplb_status_socket():
                sender = StatusSender(address, model_name)
                unless_experts_move.callback(sender.close)
        try:
            found = Rebalancer(options, [_movable(layer, shared.moe) for layer in layers], group, planner, sender)
        except NoMemoryError as error:
            _logger.warning("experts do not move while the engine runs: %s", error)
            for layer in layers:
                layer.heat = None
            return None
        unless_experts_move.pop_all()  # the rebalancer closes both
        return found


def refuse_to_reload() -> None:
    """Raise ValueError where experts move: the ranks of several engines would load weights anew in different steps, with experts on the way."""
    shared = parallel.current()
    if shared is not None and shared.moe is not None and shared.moe.options.dynamic_eplb:
        raise ValueError(
            "option 'eplb_config.dynamic_eplb' (True): weights cannot be loaded anew while experts move; restart the engine instead"
        )


def _movable(layer: AscendRoutedExperts, moe: MoeContext) -> MovableLayer:
    assert layer.heat is not None  # counted where experts move

    def place(layer: AscendRoutedExperts, placed: Placement) -> None:
        layer.place(moe.moved(placed))

    return MovableLayer(
        name=layer.layer_name,
        placed=layer.slots.placed,
        number=extract_layer_index(layer.layer_name),
        tensors=layer.slot_tensors(),
        heat=layer.heat,
        place=partial(place, layer),
    )
