# SPDX-License-Identifier: Apache-2.0
"""MoE layers on ascend-moe: vLLM's runner and router around this plugin's experts, their slots and their communication."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol, cast, runtime_checkable

import torch
from ascend_moe import (
    Activation,
    Experts,
    FloatExperts,
    MoeComm,
    forward_selected,
    to_physical,
)
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.models.utils import extract_layer_index

from vllm_ascend import graphs, parallel
from vllm_ascend.eplb.placement import LayerSlots
from vllm_ascend.eplb.record import LoadRecorder

__all__ = [
    "AscendMoERunner",
    "AscendRoutedExperts",
    "AscendUnquantizedFusedMoEMethod",
    "HasExperts",
    "activation_of",
    "check_ours",
    "clear_loads",
    "load_recorder",
    "register",
]

_ACTIVATIONS = {
    MoEActivation.SILU: Activation(),
    MoEActivation.GELU: Activation(gate="gelu"),
    MoEActivation.GELU_TANH: Activation(gate="gelu_tanh"),
    MoEActivation.SWIGLUOAI: Activation(limit=7.0, alpha=1.702, up_bias=1.0, interleaved=True),
}


@runtime_checkable
class HasExperts(Protocol):
    """What a quantisation method of routed experts must be able to do here."""

    def experts(self, layer: RoutedExperts) -> Experts:
        """The layer's experts, from the tensors that it has now."""


class AscendRoutedExperts(RoutedExperts):
    """The experts of this rank, in the slots that the placement gives it, and the way of tokens to them and back.

    Attributes:
        slots: where the layer's experts lie.
        load: int64 `[K]`: tokens that each slot of this rank has received since the recorder set it to 0; None: no load is recorded.
        heat: int32 `[E]`: tokens of this rank that chose each expert since the last interval of dynamic EPLB; None where experts do not move.
    """

    log2phy: Tensor | None
    routing_table: Tensor | None
    load: Tensor | None
    heat: Tensor | None
    _expert_map: Tensor | None

    def __init__(self, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args: Any, **kwargs: Any) -> None:
        """Create the weights of this rank's slots, where vLLM would create those of an equal share of the experts.

        Raises:
            ValueError: a config without the number of experts, experts that do not divide over the ranks, or a quantisation that this plugin
                does not have.
        """
        shared = parallel.current()
        if shared is None or shared.moe is None:
            raise ValueError(
                f"{layer_name}: a MoE layer in a model whose config names no number of experts is not supported by vllm-ascend"
            )
        self.slots = shared.moe.slots(extract_layer_index(layer_name), moe_config.num_logical_experts)
        moe_config.num_local_experts = self.slots.placed.slots_per_rank
        super().__init__(layer_name, params_dtype, moe_config, *args, **kwargs)
        if not isinstance(self.quant_method, HasExperts):
            raise ValueError(
                f"{layer_name}: experts quantised as {type(self.quant_method).__name__} are not supported by vllm-ascend"
            )
        self._over = shared.moe.groups
        self._comm = shared.moe.comm(
            self.slots.num_slots,
            sequence_parallel=moe_config.is_sequence_parallel,
            sums_later=moe_config.skip_final_all_reduce,
        )
        device = torch.get_default_device()
        maps = {"log2phy": self.slots.log2phy, "routing_table": self.slots.routing_table}
        for name, given in maps.items():
            self.register_buffer(name, None if given is None else torch.tensor(given, device=device), persistent=False)
        records = bool(shared.moe.options.expert_load_record_path)
        load = torch.zeros(self.local_num_experts, dtype=torch.int64, device=device) if records else None
        self.register_buffer("load", load, persistent=False)
        self._counted, self._real_rows = shared.moe.counted, shared.moe.real
        for rows, copies in ((self._counted, moe_config.experts_per_token), (self._real_rows, 1)):
            if rows is not None:
                rows.reserve(copies)
        moves = self._counted is not None
        heat = torch.zeros(self.slots.placed.num_experts, dtype=torch.int32, device=device) if moves else None
        self.register_buffer("heat", heat, persistent=False)

    def update_expert_map_info(self) -> None:
        """Set what vLLM derives from an equal share of the experts to what follows from this rank's slots."""
        super().update_expert_map_info()  # type: ignore[no-untyped-call]
        self.local_num_experts = self.slots.placed.slots_per_rank
        if self._expert_map is not None:
            self._expert_map = torch.tensor(self.slots.expert_map, device=self._expert_map.device)

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        """This rank's slot of an expert, or -1. vLLM's weight loader asks for it; a rank has one replica of an expert at most."""
        return int(self.slots.expert_map[expert_id])

    def slot_tensors(self) -> dict[str, Tensor]:
        """Everything that is kept for the experts of this rank, a row for each slot.

        Raises:
            ValueError: a parameter with a row for each slot that the experts' products do not read.
        """
        experts = cast(HasExperts, self.quant_method).experts(self)
        tensors = {one.name: getattr(experts, one.name) for one in fields(cast(Any, experts))}
        tensors = {name: values for name, values in tensors.items() if isinstance(values, Tensor)}
        known = {values.data_ptr() for values in tensors.values()}
        for name, values in self.named_parameters():
            if values.dim() and len(values) == self.local_num_experts and values.data_ptr() not in known:
                raise ValueError(
                    f"{self.layer_name}: {name} cannot be moved with the experts; leave eplb_config.dynamic_eplb out"
                )
        return tensors

    def place(self, slots: LayerSlots) -> None:
        """Let tokens go to where experts lie now. The tensors stay where they are, so that captured graphs read the new values."""
        self.slots = slots
        maps = ((self._expert_map, slots.expert_map), (self.log2phy, slots.log2phy), (self.routing_table, slots.routing_table))  # fmt: skip
        for tensor, values in maps:
            if tensor is not None and values is not None:
                tensor.copy_(torch.tensor(values).pin_memory(), non_blocking=True)

    def weight_loader(self, param: Any, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Load a weight with vLLM's loader. A model that loads all experts of a rank as one tensor (Llama 4) takes them in ascending order.

        Raises:
            ValueError: the slots of this rank are not in that order.
        """
        if loaded_weight.dim() == 3:
            held = self.slots.expert_map[self.slots.expert_map >= 0]
            if (held[1:] < held[:-1]).any():
                raise ValueError(
                    f"{self.layer_name}: this model loads the experts of a rank in ascending order, but slots are placed otherwise; "
                    "leave eplb_config out"
                )
        return super().weight_loader(param, loaded_weight, *args, **kwargs)

    def forward_modular(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """The routed experts' output for this rank's tokens, complete where `comm_of_step` says so, else a partial sum over TP.

        Args:
            x: `[N, H]`.
            topk_weights: `[N, K]`.
            topk_ids: `[N, K]`, logical experts.
            shared_experts: not used, the runner computes them.
            shared_experts_input: not used.

        Returns:
            `[N, H]`.
        """
        weights = topk_weights.float()
        if self.apply_router_weight_on_input:  # vLLM has it for one expert a token alone
            x, weights = (x * weights).to(x.dtype), torch.ones_like(weights)
        comm, dp_tokens = self.comm_of_step(), parallel.step().dp_tokens
        if self.heat is not None:
            self._count(topk_ids)
        output = forward_selected(
            x,
            weights,
            self._physical(topk_ids, comm),
            experts=cast(HasExperts, self.quant_method).experts(self),
            comm=comm,
            tokens=self._tokens(dp_tokens, comm),
            mask=self._real(x),
        )
        if self.load is not None:
            self.load += output.load
        return output.hidden

    def comm_of_step(self) -> MoeComm:
        """How tokens travel in the step whose forward pass runs; it follows from the step alone, so that all ranks agree."""
        return self._comm.of_step(parallel.most_tokens(), captured=graphs.is_captured())

    def _physical(self, ids: Tensor, comm: MoeComm) -> Tensor:
        """The slots of experts. Where ranks return partial sums, several of them have each token and must choose the same slot for it."""
        if self.routing_table is not None and not comm.output_is_reduced:
            return to_physical(ids, routing_table=self.routing_table)
        return to_physical(ids, log2phy=self.log2phy)

    def _tokens(self, dp_tokens: tuple[int, ...] | None, comm: MoeComm) -> tuple[int, ...] | None:
        """Tokens of each data parallel rank, or under sequence parallelism of each rank."""
        if dp_tokens is None or not comm.env.sequence_parallel:
            return dp_tokens
        ranks = self._over.tp.world_size
        return tuple(-(-tokens // ranks) for tokens in dp_tokens for _ in range(ranks))

    def _count(self, ids: Tensor) -> None:
        """Add the choices `[N, C]` of this rank's tokens to `heat`. Of TP ranks that have the same tokens, the first one counts."""
        if self._counted is None or self.heat is None:
            return
        if self.moe_config.is_sequence_parallel or self._over.tp.rank_in_group == 0:
            self._counted.add(self.heat, ids, first=self._first(len(ids)))

    def _real(self, x: Tensor) -> Tensor | None:
        """bool `[N]`: tokens of requests; not those of a step without any, nor padding. None where no load is recorded."""
        if self._real_rows is None:
            return None
        return self._real_rows.rows(1, len(x), first=self._first(len(x))).flatten().bool()

    def _first(self, rows: int) -> int:
        """The token of the step that is the first of this rank's rows: TP ranks have them all, or a part each."""
        return self._over.tp.rank_in_group * rows if self.moe_config.is_sequence_parallel else 0


class AscendMoERunner(MoERunner):
    """vLLM's runner, without communication of its own before and after the experts."""

    routed_experts: AscendRoutedExperts

    @property
    def do_naive_dispatch_combine(self) -> bool:
        """False: `AscendRoutedExperts` moves tokens itself."""
        return False

    @property
    def _fused_output_is_reduced(self) -> bool:
        return self.routed_experts.comm_of_step().output_is_reduced


class AscendUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
    """Experts in the model's own dtype, as two grouped products."""

    activation: Activation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build vLLM's method, without its support for weights that were transposed before: they cannot be told from others."""
        super().__init__(*args, **kwargs)
        self.supports_pre_processed_weights = False

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]  # as vLLM's own
        """Register vLLM's parameters.

        Raises:
            ValueError: a layer of another class than this plugin's; an activation that has no kernel.
        """
        check_ours(layer)
        self.activation = activation_of(layer)
        super().create_weights(layer, *args, **kwargs)

    @property
    def is_monolithic(self) -> bool:
        """False: vLLM's router chooses the experts, not this method."""
        return False

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:  # type: ignore[override]  # as vLLM's own
        """Lay the weights out as the grouped product reads them: `[L, 2I, H]` -> `[L, H, 2I]`, `[L, H, I]` -> `[L, I, H]`; biases stay `[L, 2I]` and `[L, H]`."""
        super().process_weights_after_loading(layer)
        w13, w2 = cast(Tensor, layer.w13_weight), cast(Tensor, layer.w2_weight)
        for weight in (w13, w2):
            weight.data = weight.data.transpose(1, 2).contiguous()
        for bias in self._biases(layer):
            if bias is not None and bias.dtype == torch.bfloat16:
                bias.data = bias.data.float()  # as the grouped product takes it

    def experts(self, layer: RoutedExperts) -> Experts:
        """The layer's own tensors, looked up at each call: vLLM replaces them when it loads weights anew."""
        w13, w2 = cast(Tensor, layer.w13_weight), cast(Tensor, layer.w2_weight)
        w13_bias, w2_bias = self._biases(layer)
        return FloatExperts(w13=w13.data, w2=w2.data, activation=self.activation, w13_bias=w13_bias, w2_bias=w2_bias)

    def _biases(self, layer: RoutedExperts) -> tuple[Tensor | None, Tensor | None]:
        return getattr(layer, "w13_bias", None), getattr(layer, "w2_bias", None)


def check_ours(layer: RoutedExperts) -> None:
    """Raise ValueError for experts of a class of the model's own, which would not move tokens to their ranks."""
    if not isinstance(layer, AscendRoutedExperts):
        raise ValueError(
            f"{layer.layer_name}: the model has routed experts of its own, {type(layer).__name__}, which vllm-ascend does not support"
        )


def activation_of(layer: RoutedExperts, *, has_bias: bool = False) -> Activation:
    """The activation between the two products of the layer's experts.

    Args:
        layer: of vLLM.
        has_bias: whether the experts have biases that the caller's kernels do not add.

    Raises:
        ValueError: an activation that has no kernel, or biases.
    """
    activation = _ACTIVATIONS.get(layer.activation)
    if activation is None or layer.swiglu_limit is not None or has_bias:
        raise ValueError(
            f"MoE layer with activation {layer.activation.value!r}, swiglu_limit={layer.swiglu_limit}, bias={has_bias}: "
            f"vllm-ascend supports {', '.join(kind.value for kind in _ACTIVATIONS)}, without another limit, and biases in the model's own dtype alone"
        )
    return activation


def load_recorder(model: nn.Module) -> LoadRecorder | None:
    """The recorder of a model's MoE layers; None where `eplb_config` does not ask for one. ValueError as of `LoadRecorder`."""
    counted = [
        (module, module.load)
        for module in model.modules()
        if isinstance(module, AscendRoutedExperts) and module.load is not None
    ]
    shared = parallel.current()
    if not counted or shared is None or shared.moe is None:
        return None
    groups = shared.moe.groups
    return LoadRecorder(
        shared.moe.options,
        [layer.slots.placed for layer, _ in counted],
        [load for _, load in counted],
        groups.ep,
        writes=groups.tp.rank_in_group == 0 and groups.dp.rank_in_group == 0,
    )


def clear_loads(model: nn.Module) -> None:
    """Set what the MoE layers have counted of the load of their slots to 0."""
    for module in model.modules():
        if isinstance(module, AscendRoutedExperts) and module.load is not None:
            module.load.zero_()


def register() -> None:
    """Replace vLLM's classes."""
    MoERunner.register_oot(AscendMoERunner)
    RoutedExperts.register_oot(AscendRoutedExperts)
    UnquantizedFusedMoEMethod.register_oot(AscendUnquantizedFusedMoEMethod)
