# SPDX-License-Identifier: Apache-2.0
"""W8A8: int8 weights and int8 activations, the product on this rank. A layer gives one in `LinearParams.quant`.

Weights are symmetric, one scale for each output feature, int8 ``[out, in]``. Activations are quantised with one scale
and offset for the layer, known beforehand (static), or with a scale for each token (dynamic).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ascend_linear import kernels

__all__ = ["QuantMethod", "W8A8Dynamic", "W8A8Static"]

_OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class W8A8Static:
    """Activations with a scale and an offset of the layer: ``x ~ (x8 - input_offset) * input_scale``.

    ``x @ w.T ~ (x8 @ w8.T + quant_bias) * deq_scale``.

    Args:
        input_scale: one number, floating point.
        input_offset: one number.
        deq_scale: float32 ``[out]`` (column ops: of this rank's shard), ``input_scale`` times the weight's scale.
        quant_bias: int32 ``[out]`` of the *whole* layer, ``-input_offset * sum over in of w8``, with the layer's bias
            divided by `deq_scale` where the checkpoint has it in there. Row ops add it on one rank. None: 0.
        output_dtype: float16 or bfloat16, which is the type of the activations too. (float32 only where the kernels
            take it, which hardware does not.)

    Raises:
        ValueError: shapes or types that do not fit.
    """

    input_scale: Tensor
    input_offset: Tensor
    deq_scale: Tensor
    quant_bias: Tensor | None = None
    output_dtype: torch.dtype = torch.bfloat16
    _reciprocal: Tensor = field(init=False, repr=False)
    _offset: Tensor = field(init=False, repr=False)
    _dequantised_bias: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check, and prepare what the kernels take: reciprocal, offset and bias in the activations' type."""
        _check_output(self.output_dtype)
        for name in ("input_scale", "input_offset"):
            if getattr(self, name).numel() != 1:
                raise ValueError(
                    f"{name} of shape {tuple(getattr(self, name).shape)}: must be one number for the layer"
                )
        _check_scale("deq_scale", self.deq_scale)
        if self.quant_bias is not None and (
            self.quant_bias.dtype != torch.int32 or self.quant_bias.shape != self.deq_scale.shape
        ):
            raise ValueError(
                f"quant_bias of {self.quant_bias.dtype} and shape {tuple(self.quant_bias.shape)}: "
                f"must be int32 of deq_scale's shape {tuple(self.deq_scale.shape)}"
            )
        reciprocal = self.input_scale.reshape(1).float().reciprocal().to(self.output_dtype)
        object.__setattr__(self, "_reciprocal", reciprocal)
        object.__setattr__(self, "_offset", self.input_offset.reshape(1).to(self.output_dtype))
        bias = None if self.quant_bias is None else (self.quant_bias * self.deq_scale).to(self.output_dtype)
        object.__setattr__(self, "_dequantised_bias", bias)

    def replace(self, by: "W8A8Static") -> None:
        """Take the values of another product of the same layer, in place: ops that hold this one compute with them from then on."""
        _copy(
            self,
            by,
            ("input_scale", "input_offset", "deq_scale", "quant_bias", "_reciprocal", "_offset", "_dequantised_bias"),
        )

    def quantise(self, x: Tensor) -> Tensor:
        """`x` as int8, which `product` takes too; ranks may exchange it in this form, half the bytes."""
        return kernels.quantize(x, self._reciprocal, self._offset)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, once: bool = True) -> Tensor:
        """``[..., in] -> [..., out]`` on this rank.

        Args:
            x: floating point, or int8 of `quantise`.
            weight: int8 ``[out, in]``.
            bias: added after scaling, floating point ``[out]``.
            once: whether this rank adds `quant_bias`.
        """
        if x.numel() == 0:
            return x.new_zeros((*x.shape[:-1], weight.shape[0]), dtype=self.output_dtype)
        quantised = x if x.dtype == torch.int8 else self.quantise(x)
        output = kernels.quant_matmul(
            quantised.reshape(-1, x.shape[-1]),
            weight.t(),
            self.deq_scale,
            bias=self.quant_bias if once else None,
            output_dtype=self.output_dtype,
        )
        output = output.view(*x.shape[:-1], weight.shape[0])
        return output if bias is None else output + bias

    def reduce_scattered_product(self, x: Tensor, weight: Tensor, comm_name: str, world_size: int) -> Tensor:
        """The product summed over ranks, of which this rank gets its rows, in one kernel: ``[n, in] -> [n / W, out]``.

        The kernel takes no bias: `quant_bias` is added to the sum, which every rank has of its own rows. It scales tokens as well, by 1 here.
        """
        output = kernels.mm_reduce_scatter(
            self.quantise(x),
            weight.t(),
            comm_name,
            world_size,
            token_scale=torch.ones(len(x), 1, dtype=torch.float32, device=x.device),
            weight_scale=self.deq_scale.view(1, -1),
            output_dtype=self.output_dtype,
        )
        return output if self._dequantised_bias is None else output + self._dequantised_bias


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class W8A8Dynamic:
    """Activations with a scale for each token, found when they come: ``x ~ x8 * token_scale``.

    Args:
        weight_scale: float32 ``[out]`` (column ops: of this rank's shard).
        output_dtype: float16 or bfloat16, which is the type of the activations too. (float32 only where the kernels
            take it, which hardware does not.)

    Raises:
        ValueError: shapes or types that do not fit.
    """

    weight_scale: Tensor
    output_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        """Check."""
        _check_output(self.output_dtype)
        _check_scale("weight_scale", self.weight_scale)

    def replace(self, by: "W8A8Dynamic") -> None:
        """Take the values of another product of the same layer, in place: ops that hold this one compute with them from then on."""
        _copy(self, by, ("weight_scale",))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, once: bool = True) -> Tensor:
        """``[..., in] -> [..., out]`` on this rank; `bias` (floating point) is added after scaling."""
        if x.numel() == 0:
            return x.new_zeros((*x.shape[:-1], weight.shape[0]), dtype=self.output_dtype)
        quantised, token_scale = kernels.dynamic_quant(x.reshape(-1, x.shape[-1]))
        output = kernels.quant_matmul(
            quantised,
            weight.t(),
            self.weight_scale,
            token_scale=token_scale,
            bias=bias,
            output_dtype=self.output_dtype,
        )
        return output.view(*x.shape[:-1], weight.shape[0])


QuantMethod = W8A8Static | W8A8Dynamic


def _copy(mine: object, other: object, names: tuple[str, ...]) -> None:
    """Copy the tensors of these names from one product to another.

    Raises:
        ValueError: the products are of different layers: a tensor that only one of them has, or one of another shape.
    """
    pairs = [(name, getattr(mine, name), getattr(other, name)) for name in names]
    for name, old, new in pairs:
        if (old is None) != (new is None) or (old is not None and old.shape != new.shape):
            raise ValueError(f"{name} of shape {_shape(new)}: must be of shape {_shape(old)}, as before")
    for _, old, new in pairs:
        if old is not None:
            old.copy_(new)


def _shape(tensor: Tensor | None) -> str:
    return "None" if tensor is None else str(tuple(tensor.shape))


def _check_output(output_dtype: torch.dtype) -> None:
    if output_dtype not in _OUTPUTS:
        raise ValueError(f"output_dtype={output_dtype}: must be torch.float16 or torch.bfloat16")


def _check_scale(name: str, scale: Tensor) -> None:
    if scale.dtype != torch.float32 or scale.dim() != 1:
        raise ValueError(f"{name} of {scale.dtype} and shape {tuple(scale.shape)}: must be float32 [out]")
