# SPDX-License-Identifier: Apache-2.0
"""Where tokens become split under FlashComm1 and whole again, as hooks on modules: the model's own code knows nothing of it.

N: tokens of the step; P: N padded to a multiple of TP. Between the hooks a rank holds `[P / TP, H]`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.sequence import IntermediateTensors

from vllm_ascend import parallel

__all__ = ["attach"]


def attach(model: nn.Module) -> None:
    """Put the hooks on `model`, so that real and dummy runs both go through them. Without FlashComm1 there are none.

    The embedding layer splits what it embeds itself; here are the other ways in and out: embeddings that are given, tensors of an earlier
    pipeline stage, the model's output, and MoE layers, which take all tokens on every rank.
    """
    shared = parallel.current()
    if shared is None or not shared.env.enable_flashcomm1:
        return
    model.register_forward_pre_hook(_split_inputs, with_kwargs=True)
    model.register_forward_hook(_join_output)
    for module in model.modules():
        if isinstance(module, MoERunner):
            module.register_forward_pre_hook(_join_inputs, with_kwargs=True)
            module.register_forward_hook(_split_output)


def _split_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    shared, state = parallel.current(), parallel.step()
    if shared is None or not state.flashcomm1:
        return None
    given = {name: kwargs[name] for name in ("inputs_embeds", "intermediate_tensors") if kwargs.get(name) is not None}
    return args, kwargs | {name: _each(value, lambda x: shared.own_chunk(x, state)) for name, value in given.items()}


def _join_output(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    shared, state = parallel.current(), parallel.step()
    if shared is None or not state.flashcomm1:
        return output
    return _each(output, lambda x: shared.all_chunks(x, state))


def _join_inputs(
    runner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hidden states and router logits; often one tensor stands for both."""
    shared, state = parallel.current(), parallel.step()
    if shared is None or not state.flashcomm1:
        return None
    names = ("hidden_states", "router_logits", "input_ids", "shared_experts_input")
    given = dict(zip(names, args, strict=False)) | kwargs
    joined: dict[int, Tensor] = {}
    for name in ("hidden_states", "router_logits", "shared_experts_input"):
        if (x := given.get(name)) is not None:
            if id(x) not in joined:
                joined[id(x)] = shared.all_chunks(x, state)
            given[name] = joined[id(x)]
    return (), given


def _split_output(runner: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    shared, state = parallel.current(), parallel.step()
    return output if shared is None or not state.flashcomm1 else shared.own_chunk(output, state)


def _each(value: Any, function: Any) -> Any:
    """`function` of every tensor in a model's input or output."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, IntermediateTensors):
        return IntermediateTensors({name: function(x) for name, x in value.tensors.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_each(x, function) for x in value)
    return value
