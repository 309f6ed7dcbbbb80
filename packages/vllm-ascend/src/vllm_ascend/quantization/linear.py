# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a quantised checkpoint: their tensors are vLLM's parameters, their product is ascend-linear's.

A method leaves the product at `layer.quant`, which the layer hands to its op (`layers/linear.py`) or, where it has none, calls through `apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ascend_linear import QuantMethod, W8A8Dynamic, W8A8Static
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter

from vllm_ascend import kernels, parallel
from vllm_ascend.quantization.checks import (
    DUMMY_INPUT_SCALE,
    DUMMY_WEIGHT_SCALE,
    check_finite,
    check_product,
    check_symmetric,
    dummy,
    int8,
)

__all__ = ["W8A8DynamicLinearMethod", "W8A8StaticLinearMethod", "float_scale"]


def float_scale(loaded: Tensor) -> Tensor:
    """A `deq_scale` as float32. The checkpoint of a float16 model has its 32 bits in an int64, as kernels of that type take it."""
    return loaded.to(torch.int32).view(torch.float32) if loaded.dtype == torch.int64 else loaded


class _W8A8LinearMethod(LinearMethodBase):
    """What both have in common: an int8 weight `[out, in]`, whose scales are cut with the output features.

    Args:
        random: whether weights start with random values, because none will be loaded.
    """

    optional_parameters: frozenset[str] = frozenset()
    """Parameters that a checkpoint may lack."""

    def __init__(self, *, random: bool = False) -> None:
        """Store the argument."""
        self._random = random

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors, of this rank's shard."""
        loader: Callable[..., Any] = extra_weight_attrs["weight_loader"]
        out = sum(output_partition_sizes)
        weight = int8(out, input_size_per_partition, random=self._random)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        )
        self.create_scales(layer, out, len(output_partition_sizes), loader)

    def create_scales(self, layer: Any, out: int, parts: int, loader: Callable[..., Any]) -> None:
        """Register the tensors beside the weight, for `out` output features in `parts` layers that are fused."""
        raise NotImplementedError

    def give(self, layer: Any, quant: W8A8Dynamic | W8A8Static) -> None:
        """Leave the product at `layer.quant`. Where one is there already, weights have been loaded anew, and ops hold it: it takes the new values.

        The weight changes its format, unless ops send it from rank to rank, which is done with numbers in their own order.

        Raises:
            ValueError: a product of another type, or of other shapes.
        """
        shared, op = parallel.current(), getattr(layer, "op", None)
        if shared is not None and shared.config.weight_nz_mode and not (op is not None and op.streams_weight):
            layer.weight.data = kernels.in_fractal_nz(layer.weight.data)
        held = getattr(layer, "quant", None)
        if held is None:
            layer.quant = quant
        else:
            held.replace(quant)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product on this rank: `[..., in] -> [..., out]`."""
        quant: QuantMethod = layer.quant
        once = not isinstance(layer, RowParallelLinear) or layer.tp_rank == 0
        return quant.product(x, layer.weight, bias, once=once)


@register_weight_loader_v2_supported_method
class W8A8DynamicLinearMethod(_W8A8LinearMethod):
    """Activations with a scale for each token."""

    def create_scales(self, layer: Any, out: int, parts: int, loader: Callable[..., Any]) -> None:
        """`weight_scale` and `weight_offset`, `[out, 1]`."""
        _create_weight_scale(layer, out, loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, and make the product.

        Raises:
            ValueError: a scale that is not finite, or a weight that is not symmetric.
        """
        check_finite(layer.prefix, weight_scale=layer.weight_scale, weight_offset=layer.weight_offset)
        check_symmetric(layer.prefix, layer.weight_offset)
        del layer.weight_offset
        layer.weight_scale = Parameter(layer.weight_scale.data.reshape(-1), requires_grad=False)
        self.give(layer, W8A8Dynamic(weight_scale=layer.weight_scale.data, output_dtype=layer.params_dtype))


@register_weight_loader_v2_supported_method
class W8A8StaticLinearMethod(_W8A8LinearMethod):
    """Activations with one scale and offset for the layer. `quant_bias` holds the layer's bias, and `bias` is not added again.

    Args:
        random: whether weights start with random values, because none will be loaded.
        has_weight_scale: whether the checkpoint has the weight's own scale and offset as well, as those of older ModelSlim do. `deq_scale` has the scale in it.
    """

    optional_parameters = frozenset({"bias"})

    def __init__(self, *, random: bool = False, has_weight_scale: bool = False) -> None:
        """Store the arguments."""
        super().__init__(random=random)
        self._has_weight_scale = has_weight_scale

    def create_scales(self, layer: Any, out: int, parts: int, loader: Callable[..., Any]) -> None:
        """`input_scale`, `input_offset`: one number for each part; `quant_bias`, `deq_scale`: `[out]`."""
        for name, value in (("input_scale", DUMMY_INPUT_SCALE), ("input_offset", 0.0)):
            number = torch.full((parts,), torch.nan, dtype=torch.float32)
            parameter = PerTensorScaleParameter(data=number, weight_loader=loader)  # type: ignore[no-untyped-call]
            layer.register_parameter(name, dummy(parameter, value))

        def load_deq_scale(param: Parameter, loaded: Tensor, *shard: Any, **options: Any) -> Any:
            # vLLM passes another parameter by this name when it loads weights anew.
            return loader(param, float_scale(loaded), *shard, **options)

        scale = torch.full((out,), torch.nan, dtype=torch.float32)
        deq_scale = ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=load_deq_scale)
        layer.register_parameter("deq_scale", dummy(deq_scale, DUMMY_INPUT_SCALE * DUMMY_WEIGHT_SCALE))
        bias = torch.zeros(out, dtype=torch.int32)
        layer.register_parameter(
            "quant_bias", ChannelQuantScaleParameter(data=bias, output_dim=0, weight_loader=loader)
        )
        if self._has_weight_scale:
            _create_weight_scale(layer, out, loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, and make the product.

        Raises:
            ValueError: a scale that is not finite, parts of a fused layer that quantise their common input in different ways, a weight that is not
                symmetric, or scales that do not belong together.
        """
        check_finite(
            layer.prefix, input_scale=layer.input_scale, input_offset=layer.input_offset, deq_scale=layer.deq_scale
        )
        for name in ("input_scale", "input_offset"):
            number = getattr(layer, name).data
            if not torch.equal(number, number[:1].expand_as(number)):
                raise ValueError(
                    f"layer {layer.prefix!r}: its fused parts have {name} {number.tolist()}, but one input; they must be equal"
                )
            setattr(layer, name, Parameter(number[:1].clone(), requires_grad=False))
        if self._has_weight_scale:
            check_symmetric(layer.prefix, layer.weight_offset)
            check_product(layer.prefix, layer.deq_scale.data, layer.input_scale.data, layer.weight_scale.data)
            del layer.weight_scale, layer.weight_offset
        layer.register_parameter("bias", None)
        product = W8A8Static(
            input_scale=layer.input_scale.data,
            input_offset=layer.input_offset.data,
            deq_scale=layer.deq_scale.data,
            quant_bias=layer.quant_bias.data,
            output_dtype=layer.params_dtype,
        )
        self.give(layer, product)


def _create_weight_scale(layer: Any, out: int, loader: Callable[..., Any]) -> None:
    """Register `weight_scale` and `weight_offset`, `[out, 1]`; a checkpoint may have them as `[out]`."""

    def load_column(param: Parameter, loaded: Tensor, *shard: Any, **options: Any) -> Any:
        column = loaded.reshape(-1, 1) if loaded.dim() == 1 else loaded
        if column.dim() != 2 or column.shape[1] != 1:
            raise ValueError(
                f"layer {layer.prefix!r}: weight_scale or weight_offset of shape {list(loaded.shape)} must be [out, 1], one for each output "
                "feature; weights quantised in groups are not supported"
            )
        return loader(param, column, *shard, **options)  # `param` is a name that vLLM knows, as in `load_deq_scale`

    for name, value in (("weight_scale", DUMMY_WEIGHT_SCALE), ("weight_offset", 0.0)):
        scale = torch.full((out, 1), torch.nan, dtype=torch.float32)
        parameter = ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=load_column)
        layer.register_parameter(name, dummy(parameter, value))
