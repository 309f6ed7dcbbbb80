# SPDX-License-Identifier: Apache-2.0
"""What must hold of the tensors of a quantised layer once they are loaded, and the values that they start with. `loader.py` checks that they were loaded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = [
    "DUMMY_INPUT_SCALE",
    "DUMMY_WEIGHT_SCALE",
    "check_finite",
    "check_product",
    "check_symmetric",
    "dummy",
    "int8",
]

# With `--load-format dummy` vLLM draws floating-point parameters at random, but for those that name a value. Int8 weights are drawn from -127 to 127; with
# this scale they are of the size that a model's weights have.
DUMMY_WEIGHT_SCALE = 2.0**-12
DUMMY_INPUT_SCALE = 2.0**-5
# deq_scale and each of its two factors may have been rounded to bfloat16, by 2^-8 of their value at most; the factors also to float16, whose
# smallest numbers are 2^-24 apart.
_ROUNDING, _ROUNDING_SMALL = 2.0**-6, 2.0**-25


def int8(*shape: int, random: bool) -> Tensor:
    """An int8 weight before it is loaded: zeros, or the values of a dummy one, equal on all ranks."""
    if not random:
        return torch.zeros(*shape, dtype=torch.int8)
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(1234)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8, device=device)


def dummy(parameter: Parameter, value: float) -> Parameter:
    """Let vLLM fill the parameter with `value` where it would draw a random one."""
    parameter.dummy_weight_value = value  # type: ignore[attr-defined]  # vLLM looks for this attribute
    return parameter


def check_finite(layer: str, **tensors: Tensor) -> None:
    """Raise ValueError if one of `tensors` has values that are infinite or not a number."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"layer {layer!r}: {name} has values that are not finite")


def check_symmetric(layer: str, offset: Tensor) -> None:
    """Raise ValueError for a weight with an offset."""
    if bool(offset.any()):
        raise ValueError(
            f"layer {layer!r}: weight_offset has values other than 0; asymmetric weights are not supported"
        )


def check_product(layer: str, deq_scale: Tensor, input_scale: Tensor, weight_scale: Tensor) -> None:
    """Raise ValueError unless `deq_scale` is the product of the two others, as far as rounding them to 16 bits allows.

    Args:
        layer: for the message.
        deq_scale: `[out]`.
        input_scale: `[1]`.
        weight_scale: `[out, 1]`.
    """
    one, rows = input_scale.float(), weight_scale.float().reshape(-1)
    wanted = one * rows
    off = (deq_scale - wanted).abs() > _ROUNDING * wanted.abs() + _ROUNDING_SMALL * (one.abs() + rows.abs())
    if bool(off.any()):
        row = int(off.nonzero()[0])
        raise ValueError(
            f"layer {layer!r}: deq_scale[{row}] is {deq_scale[row].item():.6g}, but input_scale * weight_scale is {wanted[row].item():.6g}; "
            "the checkpoint's scales do not belong together"
        )
