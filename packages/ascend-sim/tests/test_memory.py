# SPDX-License-Identifier: Apache-2.0
"""Memory that nothing has written is poisoned, whichever way a program came by it."""

import pytest
import torch

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = {torch.int32: 0x7FFF7FFF, torch.int64: 0x7FFF7FFF7FFF7FFF, torch.int16: 0x7FFF}
WAYS = {
    "empty": lambda dtype: torch.empty(4, 6, dtype=dtype, device="npu"),
    "empty_strided": lambda dtype: torch.empty_strided((4, 6), (1, 4), dtype=dtype, device="npu"),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(4, 6, dtype=dtype, device="npu")),
    "empty_like with strides": lambda dtype: torch.empty_like(torch.zeros(6, 4, dtype=dtype, device="npu").t()),
    "empty_like of a host tensor": lambda dtype: torch.empty_like(torch.zeros(4, 6, dtype=dtype), device="npu"),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype, device="npu").new_empty(4, 6),
    "new_empty_strided": lambda dtype: torch.zeros(1, dtype=dtype, device="npu").new_empty_strided((4, 6), (6, 1)),
    "module": lambda dtype: torch.nn.Parameter(torch.empty(4, 6, dtype=dtype, device="npu"), requires_grad=False).data,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_are_nan(way, dtype):
    t = WAYS[way](dtype)
    assert t.device.type == "npu"
    assert t.shape == (4, 6)
    assert t.cpu().double().isnan().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_are_out_of_every_range(way, dtype):
    assert WAYS[way](dtype).eq(INTEGERS[dtype]).all()


def test_a_block_that_is_used_again():
    first = torch.zeros(1000, device="npu")
    place = first.data_ptr()
    del first
    second = torch.empty(1000, device="npu")
    assert second.data_ptr() == place
    assert second.isnan().all()


def test_an_odd_number_of_bytes():
    t = torch.empty(3, dtype=torch.uint8, device="npu")
    assert t.tolist() == [255, 127, 127]


def test_what_has_contents_has_them():
    assert torch.zeros(5, device="npu").eq(0).all()
    assert torch.full((5,), 3.0, device="npu").eq(3).all()
    assert torch.zeros_like(torch.empty(5, device="npu")).eq(0).all()
    assert torch.tensor([1.0, 2.0], device="npu").tolist() == [1, 2]
    assert torch.empty(0, device="npu").numel() == 0
