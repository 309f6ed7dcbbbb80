# SPDX-License-Identifier: Apache-2.0
"""Which elements of a parameter were written."""

import pytest
import torch
from torch import nn
from vllm_ascend.loaded import LoadRecord, region_of


def written(parameter, write):
    with LoadRecord({"weight": parameter}) as record:
        write(parameter)
    return record


def halves(parameter):
    first, second = parameter.detach().chunk(2)
    return {"first": region_of(first), "second": region_of(second)}


@pytest.mark.parametrize("device", ["cpu", "meta", "npu"])
def test_what_was_not_written_is_known_on_any_device(device):
    parameter = nn.Parameter(torch.empty(4, 3, device=device))
    record = written(parameter, lambda weight: weight.data.narrow(0, 2, 2).copy_(torch.ones(2, 3)))
    assert record.unwritten("weight", halves(parameter)) == ["first"]
    assert record.touched("weight")
    record = written(parameter, lambda weight: weight.data.copy_(torch.ones(4, 3)))
    assert record.unwritten("weight", halves(parameter)) == []
    record = written(parameter, lambda weight: None)
    assert record.unwritten("weight", halves(parameter)) == ["first", "second"]
    assert not record.touched("weight")


def test_a_part_that_is_written_twice_counts_once():
    parameter = nn.Parameter(torch.empty(4, 3))

    def write(weight):
        for _ in range(2):
            weight.data[:2].copy_(torch.ones(2, 3))

    record = written(parameter, write)
    assert record.written_elements("weight") == 6
    assert record.unwritten("weight", halves(parameter)) == ["second"]


def test_parts_that_overlap_or_are_not_contiguous_are_counted_by_element():
    parameter = nn.Parameter(torch.empty(4, 6))

    def write(weight):
        weight.data[:, 1:3].copy_(torch.ones(4, 2))
        weight.data[0].fill_(1)
        weight.data.t()[5].zero_()

    mask = torch.zeros(4, 6)
    write(nn.Parameter(mask))
    mask[:, 5] = 1
    record = written(parameter, write)
    assert record.written_elements("weight") == int(mask.sum()) == 15
    rows = {str(row): region_of(parameter.detach()[row]) for row in range(4)}
    assert record.unwritten("weight", rows) == ["1", "2", "3"]
    columns = {str(column): region_of(parameter.detach()[:, column]) for column in range(6)}
    assert record.unwritten("weight", columns) == ["0", "3", "4"]


def test_a_parameter_whose_memory_is_exchanged_counts_as_written():
    parameter = nn.Parameter(torch.empty(4, 3))

    def exchange(weight):
        weight.data = torch.ones(4, 3)

    record = written(parameter, exchange)
    assert record.unwritten("weight", halves(parameter)) == []
    assert record.written_elements("weight") == 12
