# SPDX-License-Identifier: Apache-2.0
"""FlashComm1's split of tokens over TP, in hooks on modules, so that the code of models stays as it is.

N: tokens of the step; P: N padded to a multiple of TP. Under FlashComm1 a rank holds `[P / TP, H]` between the hooks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.sequence import IntermediateTensors

from vllm_ascend import parallel

__all__ = ["attach"]


def attach(model: nn.Module) -> None:
    """Put the hooks on `model`, so that real and dummy steps both run them. Without an option that splits tokens no hook is put.

    The embedding layer splits its own output. The hooks split embeddings that a request brings and tensors of an earlier pipeline stage, and join
    the model's output and the input of MoE layers, which take all tokens on every rank. Shared experts whose weights are whole on every
    rank (`enable_shared_expert_dp`) compute this rank's share of the tokens.
    """
    shared = parallel.current()
    if shared is None:
        return
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    if shared.env.enable_flashcomm1:
        model.register_forward_pre_hook(_split_inputs, with_kwargs=True)
        model.register_forward_hook(_join_output)
        for runner in runners:
            runner.register_forward_pre_hook(_join_inputs, with_kwargs=True)
            runner.register_forward_hook(_split_output)
    if shared.env.enable_shared_expert_dp:
        for runner in runners:
            # vLLM's own sequence parallel MoE has split the tokens of all experts already
            if runner.shared_experts is not None and not runner.moe_config.is_sequence_parallel:
                for layer in runner.shared_experts.children():
                    split = _ShareOfTokens(shared.env.tp.rank_in_group, shared.env.tp.world_size)
                    layer.register_forward_pre_hook(split.before)
                    layer.register_forward_hook(split.after)


class _ShareOfTokens:
    """Hooks of a layer that computes this rank's share of the tokens, and returns zeros for the others: a sum over ranks follows.

    Args:
        rank: this rank.
        ranks: how many share.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        """Store the rank and the number of ranks."""
        self.rank = rank
        self.ranks = ranks
        self.tokens = 0

    def _share(self) -> tuple[int, slice]:
        """Tokens with padding, and which of them are this rank's, one at least."""
        each = max(-(-self.tokens // self.ranks), 1)
        return each * self.ranks, slice(self.rank * each, (self.rank + 1) * each)

    def before(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`[N, H]` -> this rank's rows."""
        (x,) = args
        self.tokens = x.shape[0]
        padded, own = self._share()
        return (nn.functional.pad(x, (0, 0, 0, padded - self.tokens))[own],)

    def after(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """This rank's rows -> `[N, H]`."""
        padded, own = self._share()
        whole = output.new_zeros((padded, output.shape[-1]))
        whole[own] = output
        return whole[: self.tokens]


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
