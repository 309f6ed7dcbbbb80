# SPDX-License-Identifier: Apache-2.0
"""A tensor keeps the format it was cast to, and kernels refuse one that they do not take."""

import pytest
import torch
import torch_npu

NZ, ND = 29, 2
strict_only = pytest.mark.skipif(not torch.ops.ascend_sim.strict(), reason="ASCEND_SIM_STRICT=0 takes any format")


def weights(*shape):
    return torch.randint(-9, 9, shape, dtype=torch.int8, device="npu")


def format_of(t):
    return str(torch_npu.get_npu_format(t)).rpartition(".")[2]


def test_the_format_is_kept():
    w = weights(64, 96)
    cast = torch_npu.npu_format_cast(w, NZ)
    assert (format_of(w), format_of(cast)) == ("ND", "FRACTAL_NZ")
    assert torch.equal(w, cast)
    for view in (
        cast.t(),
        cast[2:],
        cast.view(2, 32, 96)[1],
        torch.nn.Parameter(cast, requires_grad=False),
        cast.detach(),
    ):
        assert format_of(view) == "FRACTAL_NZ"
    assert format_of(torch_npu.npu_format_cast(w, cast)) == "FRACTAL_NZ"
    back = torch_npu.npu_format_cast(cast, ND)
    assert format_of(back) == "ND"
    assert torch.equal(back, w)
    torch_npu.npu_format_cast_(w, NZ)
    assert format_of(w) == "FRACTAL_NZ"


def test_products_take_their_weight_in_either_format():
    x, w, scale = weights(5, 64), weights(64, 96), torch.rand(96, device="npu").bfloat16()
    plain, fractal = (
        torch_npu.npu_quant_matmul(x, weight, scale, output_dtype=torch.bfloat16)
        for weight in (w, torch_npu.npu_format_cast(w, NZ))
    )
    assert torch.equal(plain, fractal)
    grouped = weights(2, 64, 96)
    counts = torch.tensor([2, 3], device="npu")
    plain, fractal = (
        torch_npu.npu_grouped_matmul(
            [x], [weight], split_item=2, group_type=0, group_list_type=1, group_list=counts, output_dtype=torch.int32
        )[0]
        for weight in (grouped, torch_npu.npu_format_cast(grouped, NZ))
    )
    assert torch.equal(plain, fractal)


@strict_only
def test_other_operands_must_have_the_format_nd():
    x = torch_npu.npu_format_cast(weights(32, 64), NZ)
    scale = torch.rand(96, device="npu").bfloat16()
    with pytest.raises(
        RuntimeError,
        match=r"npu_quant_matmul: x1 must have the format ND, got FRACTAL_NZ; npu_format_cast\(x1, 2\) converts it",
    ):
        torch_npu.npu_quant_matmul(x, weights(64, 96), scale, output_dtype=torch.bfloat16)
    hidden = torch_npu.npu_format_cast(torch.randn(32, 64, device="npu").bfloat16(), NZ)
    with pytest.raises(RuntimeError, match="must have the format ND, got FRACTAL_NZ"):
        torch_npu.npu_swiglu(hidden)
