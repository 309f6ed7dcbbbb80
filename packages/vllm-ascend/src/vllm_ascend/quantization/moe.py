# SPDX-License-Identifier: Apache-2.0
"""Routed experts of a quantised checkpoint: their tensors are vLLM's parameters, their products are ascend-moe's."""

from __future__ import annotations

from typing import Any

import torch
from ascend_moe import Activation, Experts, W8A8Experts
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.utils import set_weight_attrs

from vllm_ascend.layers.moe import activation_of, check_ours
from vllm_ascend.quantization.checks import DUMMY_WEIGHT_SCALE, check_finite, check_symmetric, dummy, int8

__all__ = ["W8A8DynamicExpertsMethod"]

_ALIGNMENT = 64  # of npu_dequant_swiglu_quant's output width, where rows are in groups


class W8A8DynamicExpertsMethod(FusedMoEMethodBase):
    """int8 weights with a scale for each output channel, int8 rows with a scale each.

    Legend: L slots of this rank, H hidden, I this rank's share of the intermediate size.

    Args:
        moe: vLLM's description of the layer.
        random: whether weights start with random values, because none will be loaded.
    """

    activation: Activation

    def __init__(self, moe: Any, *, random: bool = False) -> None:
        """Store the arguments."""
        super().__init__(moe)
        self._random = random

    @property
    def is_monolithic(self) -> bool:
        """Routing is vLLM's, apart from this method."""
        return False

    @property
    def supports_eplb(self) -> bool:
        """Every parameter has a row for each slot."""
        return True

    def create_weights(  # type: ignore[override]  # as vLLM's own
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors for `num_experts` slots.

        Raises:
            ValueError: a layer of another class than this plugin's, an activation that has no kernel, or a share of the intermediate size that its kernel cannot take.
        """
        self.activation = activation_of(layer, has_bias=self.moe.has_bias)
        if self.activation.is_swiglu and intermediate_size_per_partition % _ALIGNMENT:
            raise ValueError(
                f"experts {layer.layer_name!r}: {intermediate_size_per_partition} intermediate features on each rank, which must be "
                f"a multiple of {_ALIGNMENT} for int8 experts; use a smaller tensor_parallel_size, or enable_expert_parallel"
            )
        check_ours(layer)
        shapes = {
            "w13": (2 * intermediate_size_per_partition, hidden_size),
            "w2": (hidden_size, intermediate_size_per_partition),
        }
        for name, (rows, columns) in shapes.items():
            scale = torch.full((num_experts, rows, 1), torch.nan, dtype=torch.float32)
            parameters = {
                f"{name}_weight": _parameter(int8(num_experts, rows, columns, random=self._random)),
                f"{name}_weight_scale": dummy(_parameter(scale), DUMMY_WEIGHT_SCALE),
                f"{name}_weight_offset": dummy(_parameter(scale.clone()), 0.0),
            }
            for full_name, parameter in parameters.items():
                attributes = {"quant_method": FusedMoeWeightScaleSupported.CHANNEL.value, **extra_weight_attrs}
                set_weight_attrs(parameter, attributes)
                layer.register_parameter(full_name, parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:  # type: ignore[override]  # as vLLM's own
        """Check what was loaded, and lay it out as the grouped products read it: `[L, 2I, H]` -> `[L, H, 2I]`, `[L, H, I]` -> `[L, I, H]`.

        Raises:
            ValueError: a scale that is not finite, or weights that are not symmetric.
        """
        # The second product's scale is of the type that its kernel takes for the layer's dtype.
        scale_dtypes = {
            "w13": torch.float32,
            "w2": torch.bfloat16 if layer.params_dtype == torch.bfloat16 else torch.float32,
        }
        for name, scale_dtype in scale_dtypes.items():
            weight, scale, offset = (
                getattr(layer, f"{name}_{end}") for end in ("weight", "weight_scale", "weight_offset")
            )
            check_finite(layer.layer_name, **{f"{name}_weight_scale": scale, f"{name}_weight_offset": offset})
            check_symmetric(layer.layer_name, offset)
            delattr(layer, f"{name}_weight_offset")
            weight.data = weight.data.transpose(1, 2).contiguous()
            scale.data = scale.data.squeeze(2).to(scale_dtype)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: vLLM's own kernels are not used."""

    def experts(self, layer: RoutedExperts) -> Experts:
        """The layer's own tensors, looked up at each call: vLLM replaces them when it loads weights anew."""

        def tensor(name: str) -> Tensor:
            parameter: Parameter = getattr(layer, name)
            return parameter.data

        return W8A8Experts(
            w13=tensor("w13_weight"),
            w13_scale=tensor("w13_weight_scale"),
            w2=tensor("w2_weight"),
            w2_scale=tensor("w2_weight_scale"),
            activation=self.activation,
        )


def _parameter(tensor: Tensor) -> Parameter:
    return Parameter(tensor, requires_grad=False)
