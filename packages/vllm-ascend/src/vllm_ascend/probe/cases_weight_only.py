# SPDX-License-Identifier: Apache-2.0
"""The kernels of `vllm_ascend.kernels` for weights of 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vllm_ascend import kernels
from vllm_ascend.probe.cases_linear import int8, positive
from vllm_ascend.probe.expected import FLOAT32, Case, Expected, exactly, random, unit

__all__ = ["cases"]

BF16 = torch.bfloat16


def cases() -> Iterator[Callable[[], Case]]:
    """What builds each case."""
    yield _packed_int4
    yield _of_int8
    yield _of_int4


def _int4(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def _packed_int4() -> Case:
    """In which order the values lie is the kernels' own affair: the product with ones on the diagonal shows them again."""

    def call(values: Tensor, ones: Tensor, scale: Tensor) -> list[Tensor]:
        return [kernels.weight_only_product(ones, kernels.packed_int4(values), scale, None, None)]

    inputs = _int4(128, 64), torch.eye(128, dtype=BF16), torch.ones(1, 64, dtype=BF16)
    return Case(
        kernel="vllm_ascend.packed_int4", shape="128 x 64, and the product with ones", inputs=inputs, call=call,
        expected=lambda values, ones, scale: [exactly(values.to(BF16))],
    )  # fmt: skip


def _summed(x: Tensor, weight: Tensor, bias: Tensor) -> list[Expected]:
    """Of float64 weights, which the kernel may round twice and once more when they are scaled."""
    y, sizes = x.double() @ weight + bias.double(), x.double().abs() @ weight.abs()
    allowed = (
        sizes * (3 * unit(BF16) + (len(weight) + 4) * FLOAT32) + y.abs() * unit(BF16) + bias.double().abs() * FLOAT32
    )
    return [Expected(value=y, allowed=allowed)]


def _of_int8() -> Case:
    def expected(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> list[Expected]:
        return _summed(x, weight.double() * scale.double(), bias)

    inputs = random(8, 512), int8(512, 256), positive(1, 256, dtype=BF16), random(256, seed=2).float()
    return Case(
        kernel="vllm_ascend.weight_only_product", shape="int8: 8 x 512 x 256, a scale for each column, bias", inputs=inputs,
        call=lambda x, weight, scale, bias: [kernels.weight_only_product(x, weight, scale, None, bias)], expected=expected,
    )  # fmt: skip


def _of_int4() -> Case:
    def call(x: Tensor, values: Tensor, scale: Tensor, offset: Tensor, bias: Tensor) -> list[Tensor]:
        return [kernels.weight_only_product(x, kernels.packed_int4(values), scale, offset, bias)]

    def expected(x: Tensor, values: Tensor, scale: Tensor, offset: Tensor, bias: Tensor) -> list[Expected]:
        scales, offsets = (each.double().repeat_interleave(128, 0) for each in (scale, offset))
        return _summed(x, (values.double() + offsets) * scales, bias)

    groups = 4
    offset = torch.arange(groups * 256).remainder(15).sub(7).view(groups, 256).to(BF16)
    inputs = random(8, 512), _int4(512, 256), positive(groups, 256, dtype=BF16), offset, random(256, seed=2).float()
    return Case(
        kernel="vllm_ascend.weight_only_product", shape="int4: 8 x 512 x 256, groups of 128 with offsets, bias", inputs=inputs,
        call=call, expected=expected,
    )  # fmt: skip
