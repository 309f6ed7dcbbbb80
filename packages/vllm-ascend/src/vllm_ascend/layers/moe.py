# SPDX-License-Identifier: Apache-2.0
"""Unquantised MoE layers on ascend-moe's kernels. vLLM routes them and moves their tokens between ranks; this rank's experts are computed here."""

from __future__ import annotations

from typing import Any, cast

import torch
from ascend_comm import Solo
from ascend_moe import (
    Activation,
    CommMethod,
    Dispatcher,
    FloatExperts,
    MoeEnv,
    RoutingSpec,
    make_dispatcher,
    select_experts,
)
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

__all__ = ["AscendUnquantizedFusedMoEMethod", "register"]

_ACTIVATIONS = {
    MoEActivation.SILU: Activation(),
    MoEActivation.GELU: Activation(gate="gelu"),
    MoEActivation.GELU_TANH: Activation(gate="gelu_tanh"),
}


class AscendUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
    """This rank's experts as two grouped products, over its share of the rows."""

    activation: Activation
    dispatcher: Dispatcher

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, but weights that were laid out before cannot be told from those that were not."""
        super().__init__(*args, **kwargs)
        self.supports_pre_processed_weights = False

    @property
    def is_monolithic(self) -> bool:
        """Routing is vLLM's, apart from this method."""
        return False

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:  # type: ignore[override]  # as vLLM's own
        """Lay the weights out as the grouped product reads them: `[L, 2I, H]` -> `[L, H, 2I]`, `[L, H, I]` -> `[L, I, H]`.

        Raises:
            ValueError: an activation that has no kernel, clamping, or biases.
        """
        super().process_weights_after_loading(layer)
        activation = _ACTIVATIONS.get(layer.activation)
        if activation is None or layer.swiglu_limit is not None or self.moe.has_bias:
            raise ValueError(
                f"MoE layer with activation {layer.activation.value!r}, swiglu_limit={layer.swiglu_limit}, bias={self.moe.has_bias}: "
                f"vllm-ascend supports {', '.join(kind.value for kind in _ACTIVATIONS)}, without limit and bias"
            )
        w13, w2 = cast(Tensor, layer.w13_weight), cast(Tensor, layer.w2_weight)
        for weight in (w13, w2):
            weight.data = weight.data.transpose(1, 2).contiguous()
        self.activation = activation
        # The ranks' part is vLLM's: for ascend-moe this rank is alone, with its own slots.
        self.dispatcher = make_dispatcher(CommMethod.ALL_GATHER, MoeEnv(ep=Solo(), num_slots=layer.local_num_experts))

    def forward_oot(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The sum over the local experts, not yet over ranks.

        Args:
            layer: which experts are local.
            x: `[N, H]`.
            topk_weights: `[N, K]`.
            topk_ids: `[N, K]`, ids among all experts.
            shared_experts: not used, the runner computes them.
            shared_experts_input: not used.

        Returns:
            `[N, H]`.
        """
        weights, ids = topk_weights.float(), topk_ids.to(torch.int32)
        if layer.expert_map is not None:  # -1 on another rank; a slot that nobody has, for the dispatcher
            local = layer.expert_map[topk_ids.long()].to(torch.int32)
            ids = torch.where(local < 0, layer.local_num_experts, local)
        if layer.apply_router_weight_on_input:  # vLLM has it for one expert a token alone
            x, weights = (x * weights).to(x.dtype), torch.ones_like(weights)
        # The layer's own tensors, looked up at each call: vLLM replaces them when it loads weights anew.
        w13, w2 = cast(Tensor, layer.w13_weight), cast(Tensor, layer.w2_weight)
        experts = FloatExperts(w13=w13.data, w2=w2.data, activation=self.activation)
        dispatched = self.dispatcher.dispatch(x, weights, ids)
        return self.dispatcher.combine(experts.forward(dispatched, x.dtype), dispatched)


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    bias: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """vLLM's operator of this name: softmax over experts, then the K best."""
    spec = RoutingSpec(top_k=topk_ids.shape[-1], scoring="softmax", renormalise=renormalize, bias=bias is not None)
    _choose(topk_weights, topk_ids, gating_output, spec, bias)


def topk_sigmoid(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: Tensor | None = None,
) -> None:
    """vLLM's operator of this name: sigmoid of each expert, then the K best."""
    spec = RoutingSpec(
        top_k=topk_ids.shape[-1], scoring="sigmoid", renormalise=renormalize, bias=bias is not None,
        routed_scaling_factor=routed_scaling_factor,
    )  # fmt: skip
    _choose(topk_weights, topk_ids, gating_output, spec, bias)


def _choose(weights: Tensor, ids: Tensor, logits: Tensor, spec: RoutingSpec, bias: Tensor | None) -> None:
    """Write what ascend-moe selects of `logits` `[N, E]` to `weights` and `ids` `[N, K]`."""
    chosen_weights, chosen = select_experts(logits, spec, bias)
    weights.copy_(chosen_weights)
    ids.copy_(chosen)


_ARGUMENTS = "Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor token_expert_indices, Tensor gating_output, bool renormalize, Tensor? bias=None"


def register() -> Any:
    """Replace vLLM's method, and define the routing operators that its routers call and that an "empty" build lacks.

    Returns:
        What keeps the operators defined; the caller holds it.
    """
    UnquantizedFusedMoEMethod.register_oot(AscendUnquantizedFusedMoEMethod)
    library: Any = torch.library.Library("_moe_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"topk_softmax({_ARGUMENTS}, Tensor? is_padding=None) -> ()")
    library.define(f"topk_sigmoid({_ARGUMENTS}, float routed_scaling_factor=1.0, Tensor? is_padding=None) -> ()")
    library.impl("topk_softmax", topk_softmax, "CompositeExplicitAutograd")
    library.impl("topk_sigmoid", topk_sigmoid, "CompositeExplicitAutograd")
    return library
