# SPDX-License-Identifier: Apache-2.0
"""One rank of the processes that test_matmul_comm.py starts: every product fused with a collective, against float64."""

import os
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch_npu
from ascend_sim.counters import counting
from sim_bounds import assert_close, gamma

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
STRICT = torch.ops.ascend_sim.strict()
NPU = torch.device("npu", RANK)
K, N = 256, 6


def operands(rows: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """x [rows, K], weight [K, N] and bias [N] of every rank; everyone knows them."""
    generator = torch.Generator().manual_seed(rows)
    found = []
    for _ in range(WORLD):
        if dtype == torch.int8:
            x, weight = (torch.randint(-128, 128, s, dtype=dtype, generator=generator) for s in ((rows, K), (N, K)))
            bias = torch.randint(-9999, 9999, (N,), dtype=torch.int32, generator=generator)
        else:
            x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((rows, K), (N, K), (N,)))
        found.append((x, weight.t(), bias))
    return found


def on_npu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(NPU) for tensor in tensors]


def close(
    actual: torch.Tensor, parts: list[torch.Tensor], products: list[torch.Tensor], rows: slice = slice(None)
) -> None:
    """The sum of the ranks' parts, whose products have the magnitudes `products`.

    Every part is computed in float32 (K products, a bias or two scales) and stored in the type of the result, once more after a bias; then each addition of two ranks'
    parts is stored in that type as well.
    """
    magnitude = sum(part.abs() for part in parts)
    allowed = gamma(WORLD + 2, actual.dtype) * magnitude + 2 * gamma(K + 4) * sum(products)
    assert_close(actual, sum(parts)[rows], allowed[rows])


def all_reduce(name: str, group) -> None:
    for dtype in (torch.float16, torch.bfloat16) if STRICT else (torch.float32,):
        for shape in ((5, K), (2, 3, K)):
            rows = torch.Size(shape[:-1]).numel()
            everyone = operands(rows, dtype)
            x, weight, bias = on_npu(*everyone[RANK])
            given = bias if RANK == 0 else None
            with counting() as work:
                y = torch_npu.npu_mm_all_reduce_base(x.view(shape), weight, name, bias=given)
            meta = torch_npu.npu_mm_all_reduce_base(x.view(shape).to("meta"), weight.to("meta"), name)
            assert (y.shape, y.dtype, y.device) == (meta.shape, meta.dtype, NPU)
            parts = [a.double() @ b.double() for a, b, _ in everyone]
            products = [a.double().abs() @ b.double().abs() for a, b, _ in everyone]
            extra = everyone[0][2].double().expand(rows, N)
            close(y.view(rows, N), [*parts, extra], [*products, extra.abs()])
            sent = work.delta.collectives["npu_mm_all_reduce_base", group.group_desc]
            assert (sent.calls, sent.bytes) == (1, 2 * y.nbytes * (WORLD - 1) // WORLD)
            assert work.delta.operators["npu::npu_mm_all_reduce_base"].flops == 2 * rows * K * N
    everyone = operands(4, torch.int8)
    x, weight, bias = on_npu(*everyone[RANK])
    scale, tokens = torch.rand(N).bfloat16() / 1000, torch.rand(4)
    for per_token in (None, tokens):
        given = None if per_token is None else per_token.to(NPU)
        y = torch_npu.npu_mm_all_reduce_base(
            x, weight, name, bias=bias, dequant_scale=scale.to(NPU), pertoken_scale=given
        )
        assert y.dtype == torch.bfloat16
        factor = scale.double() * (1 if per_token is None else tokens.double()[:, None])
        parts = [(a.double() @ b.double() + c.double()) * factor for a, b, c in everyone]
        close(y, parts, [part.abs() for part in parts])


def reduce_scatter(name: str, group) -> None:
    for dtype in (torch.float16, torch.bfloat16) if STRICT else (torch.float32,):
        everyone = operands(3 * WORLD, dtype)
        x, weight, _ = on_npu(*everyone[RANK])
        with counting() as work:
            y = torch_npu.npu_mm_reduce_scatter_base(x, weight, name, WORLD)
        meta = torch_npu.npu_mm_reduce_scatter_base(x.to("meta"), weight.to("meta"), name, WORLD)
        assert (y.shape, y.dtype, y.device) == (meta.shape, meta.dtype, NPU)
        parts = [a.double() @ b.double() for a, b, _ in everyone]
        products = [a.double().abs() @ b.double().abs() for a, b, _ in everyone]
        close(y, parts, products, slice(3 * RANK, 3 * RANK + 3))
        sent = work.delta.collectives["npu_mm_reduce_scatter_base", group.group_desc]
        assert (sent.calls, sent.bytes) == (1, y.nbytes * (WORLD - 1))
        assert work.delta.operators["npu::npu_mm_reduce_scatter_base"].flops == 2 * 3 * WORLD * K * N
    everyone = operands(2 * WORLD, torch.int8)
    x, weight, _ = on_npu(*everyone[RANK])
    scale, tokens = torch.rand(N) / 1000, torch.rand(2 * WORLD, 1)
    for output in (torch.float16, torch.bfloat16):
        for per_token in (tokens,) if STRICT else (None, tokens):
            given = None if per_token is None else per_token.to(NPU)
            options = {
                "x2_scale": scale.view(1, -1).to(NPU),
                "x1_scale": given,
                "output_dtype": output,
                "comm_mode": "aiv",
            }
            y = torch_npu.npu_mm_reduce_scatter_base(x, weight, name, WORLD, **options)
            assert y.dtype == output
            factor = scale.double() * (1 if per_token is None else tokens.double())
            parts = [a.double() @ b.double() * factor for a, b, _ in everyone]
            close(y, parts, [part.abs() for part in parts], slice(2 * RANK, 2 * RANK + 2))


def rejections(name: str) -> None:
    """On all ranks alike, before anything is exchanged."""
    x, weight, bias = on_npu(*operands(WORLD, torch.bfloat16 if STRICT else torch.float32)[RANK])
    eight, int8_weight, _ = on_npu(*operands(WORLD, torch.int8)[RANK])
    scatter, reduce = torch_npu.npu_mm_reduce_scatter_base, torch_npu.npu_mm_all_reduce_base
    cases = [
        (lambda: reduce(x, weight, "hccl_no_such_group_0-1"), "no HCCL communicator is named"),
        (lambda: reduce(x, weight, "other"), "no HCCL communicator is named 'other'"),
        (lambda: scatter(x, weight, name, WORLD + 1), "world_size .* is not that of the group"),
        (lambda: scatter(x[:1], weight, name, WORLD), "rows of input must be a multiple"),
        (lambda: reduce(x, weight[:3], name), "does not fit"),
        (lambda: reduce(x, weight, name, reduce_op="max"), "reduce_op must be 'sum'"),
        (lambda: scatter(eight, int8_weight, name, WORLD, comm_mode="aiv"), "int8 needs x2_scale"),
        (lambda: reduce(eight, int8_weight, name), "int8 needs dequant_scale"),
        (lambda: reduce(x, weight, name, x3=x), "only bias, dequant_scale and pertoken_scale"),
    ]
    if STRICT:
        short = (
            torch.ones(WORLD, 8, device=NPU, dtype=torch.bfloat16),
            torch.ones(8, N, device=NPU, dtype=torch.bfloat16),
        )
        cases += [
            (lambda: reduce(x.float(), weight.float(), name), "got Float"),
            (lambda: reduce(x[:0], weight, name), "must not be empty"),
            (lambda: scatter(*short, name, WORLD), "k must be 256 to 65534"),
            (lambda: scatter(x, weight, name, WORLD, bias=bias), "bias is not supported"),
        ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def main(init: str) -> None:
    torch.manual_seed(0)  # the same scales on every rank
    torch.npu.set_device(NPU)
    dist.init_process_group("hccl", init_method=init, rank=RANK, world_size=WORLD, timeout=timedelta(minutes=10))
    group = dist.new_group(list(range(WORLD)), backend="hccl", group_desc="fused", timeout=timedelta(minutes=10))
    name = group._get_backend(NPU).get_hccl_comm_name(RANK)
    if STRICT and WORLD == 3:
        x = torch.ones(3, K, device=NPU, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match=r"2, 4, 8, got 3"):
            torch_npu.npu_mm_reduce_scatter_base(x, x.t(), name, 3)
        with pytest.raises(RuntimeError, match=r"1, 2, 4 or 8 ranks, got 3"):
            torch_npu.npu_mm_all_reduce_base(x, x.t(), name)
    else:
        all_reduce(name, group)
        reduce_scatter(name, group)
        rejections(name)
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="no HCCL communicator is named"):
        torch_npu.npu_mm_all_reduce_base(
            *on_npu(*operands(1, torch.bfloat16 if STRICT else torch.float32)[0][:2]), name
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
