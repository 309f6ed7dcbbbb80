# SPDX-License-Identifier: Apache-2.0
"""The kernels of `ascend_linear.kernels` that one rank can run: quantisation, W8A8 products, prefetch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from ascend_linear import kernels
from torch import Tensor

from vllm_ascend.probe.expected import FLOAT32, Case, Expected, exactly, random, rounded, unit

__all__ = ["cases", "dynamically_quantised", "int8"]

BF16 = torch.bfloat16


def cases() -> Iterator[Callable[[], Case]]:
    """What builds each case."""
    yield _quantize
    yield lambda: dynamic_quant("ascend_linear.dynamic_quant", kernels.dynamic_quant)
    yield _quant_matmul_static
    yield _quant_matmul_dynamic
    yield _prefetch


def int8(*shape: int, seed: int = 0) -> Tensor:
    """Whole numbers of int8 on the CPU, the same on every machine."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def positive(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Scales between 0.001 and 0.011."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) / 100 + 0.001).to(dtype)


def _quantize() -> Case:
    def expected(x: Tensor, reciprocal: Tensor, offset: Tensor) -> list[Expected]:
        product = x.double() * reciprocal.double()
        value = product + offset.double()
        return [rounded(value, product.abs() * 2 * FLOAT32 + value.abs() * FLOAT32)]

    return Case(
        kernel="ascend_linear.quantize", shape="8 tokens of 4096, one scale",
        inputs=(random(8, 4096), torch.tensor([27.5], dtype=BF16), torch.tensor([3.0], dtype=BF16)),
        call=lambda x, scale, offset: [kernels.quantize(x, scale, offset)], expected=expected,
    )  # fmt: skip


def dynamically_quantised(y: Tensor, error: Tensor) -> list[Expected]:
    """int8 rows and float32 scales of float64 rows `y`, which the kernel computes within `error`."""
    scale = y.abs().amax(-1) / 127
    of_scale = error.amax(-1) / 127 + scale * 4 * FLOAT32
    value = y / scale[:, None]
    of_value = error / scale[:, None] + value.abs() * (of_scale / scale)[:, None] + value.abs() * 4 * FLOAT32
    return [rounded(value, of_value), Expected(value=scale, allowed=of_scale)]


def dynamic_quant(name: str, kernel: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Case:
    """Of either package: `kernel` is the function `name`."""
    return Case(
        kernel=name, shape="8 tokens of 4096", inputs=[random(8, 4096)], call=kernel,
        expected=lambda x: dynamically_quantised(x.double(), torch.zeros(x.shape, dtype=torch.float64)),
    )  # fmt: skip


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return (x.long() @ weight.long()).double()


def _quant_matmul_static() -> Case:
    def expected(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> list[Expected]:
        value = (_product(x, weight) + bias.double()) * scale.double()
        return [Expected(value=value, allowed=value.abs() * (unit(BF16) + 4 * FLOAT32))]

    inputs = int8(8, 512), int8(512, 1024, seed=1), positive(1024), torch.arange(-512, 512, dtype=torch.int32)
    return Case(
        kernel="ascend_linear.quant_matmul", shape="static: 8 x 512 x 1024, int32 bias", inputs=inputs,
        call=lambda x, weight, scale, bias: [kernels.quant_matmul(x, weight, scale, bias=bias, output_dtype=BF16)],
        expected=expected,
    )  # fmt: skip


def _quant_matmul_dynamic() -> Case:
    def expected(x: Tensor, weight: Tensor, scale: Tensor, token_scale: Tensor) -> list[Expected]:
        value = _product(x, weight) * scale.double() * token_scale.double()[:, None]
        return [Expected(value=value, allowed=value.abs() * (unit(BF16) + 6 * FLOAT32))]

    inputs = int8(8, 512), int8(512, 1024, seed=1), positive(1024), positive(8, seed=1)
    return Case(
        kernel="ascend_linear.quant_matmul", shape="dynamic: 8 x 512 x 1024", inputs=inputs,
        call=lambda x, weight, scale, token_scale: [
            kernels.quant_matmul(x, weight, scale, token_scale=token_scale, output_dtype=BF16)
        ],
        expected=expected,
    )  # fmt: skip


def _prefetch() -> Case:
    """It has no result: the weight is what it was, also to the stream that waits for the prefetch."""

    def call(weight: Tensor, dependency: Tensor) -> list[Tensor]:
        stream = kernels.side_stream()
        kernels.prefetch(weight, dependency, weight.numel() * weight.element_size(), stream)
        kernels.wait_for(stream)
        return [weight]

    return Case(
        kernel="ascend_linear.prefetch", shape="a weight of 1024 x 1024", inputs=(random(1024, 1024), random(8, 1024)), call=call,
        expected=lambda weight, dependency: [exactly(weight)],
    )  # fmt: skip
