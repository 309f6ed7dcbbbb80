# SPDX-License-Identifier: Apache-2.0
"""Counted tokens: padding never, phases by request, tokens of a part of a step by where it begins."""

import numpy as np
import pytest
import torch
from vllm_ascend.eplb.observe import CountedRows, LoadSnapshot, counted_rows

ENDS = [1, 4, 5, 7]  # requests of 1, 3, 1 and 2 tokens


def slowly(ends, rows, stage, first):
    """Token by token."""
    found = []
    for token in range(first, first + rows):
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False) if begin <= token < end]
        phase = None if not lengths else "prefill" if lengths[0] > 1 else "decode"
        found.append(int(phase is not None and stage in ("all", phase)))
    return found


@pytest.mark.parametrize("stage", ["all", "prefill", "decode"])
@pytest.mark.parametrize(("rows", "first"), [(7, 0), (10, 0), (4, 0), (4, 4), (4, 8), (3, 2)])
def test_rows_that_count(stage, rows, first):
    assert counted_rows(ENDS, rows, stage, first=first).tolist() == slowly(ENDS, rows, stage, first)


def counted(stage, *, rows=16):
    """Rows of layers with two experts a token."""
    made = CountedRows(stage, rows, "npu")
    made.reserve(2)
    return made


def test_a_step_without_requests_counts_nothing():
    """Also after one with some, whose rows were on the device."""
    assert counted_rows([], 3, "all").tolist() == [0, 0, 0]
    heat, rows = torch.zeros(4, dtype=torch.int32, device="npu"), counted("all")
    rows.begin(ENDS)
    rows.begin([])
    rows.add(heat, torch.zeros(3, 2, dtype=torch.int32, device="npu"))
    assert not heat.any()


def test_rows_of_other_widths_lie_apart():
    rows = counted("all", rows=9)
    rows.reserve(1)
    rows.begin([2])
    assert rows.rows(1, 3).tolist() == [[1], [1], [0]]
    assert rows.rows(2, 3, first=1).tolist() == [[1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_layers_add_their_own_choices_with_one_kernel_each(dtype):
    from ascend_sim import counters

    generator = torch.Generator().manual_seed(0)
    rows, steps = counted("decode"), [list(ENDS), [2, 3, 9]]
    heat = [torch.zeros(5, dtype=torch.int32, device="npu") for _ in range(3)]
    expected = np.zeros((3, 5), np.int64)
    for ends in steps:
        weights = slowly(ends, 12, "decode", 0)
        rows.begin(ends)
        for layer in range(3):
            ids = torch.randint(5, (12, 2), generator=generator, dtype=dtype)
            for row, chosen in zip(weights, ids.tolist(), strict=True):
                for expert in chosen:
                    expected[layer, expert] += row
            on_device = ids.npu()
            before = counters.snapshot().operators
            rows.add(heat[layer], on_device)
            after = counters.snapshot().operators
            called = {
                name: count.calls - (before[name].calls if name in before else 0)
                for name, count in after.items()
                if name not in before or count.calls > before[name].calls
            }
            assert called == {"aten::index_add_": 1}, called


def test_a_captured_layer_counts_the_rows_of_each_replay():
    rows, ids = counted("all"), torch.zeros(4, 2, dtype=torch.int32, device="npu")
    heat = torch.zeros(3, dtype=torch.int32, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        rows.add(heat, ids)
    heat.zero_()
    for ends, total in (([1, 2, 3], 6), ([1], 8), ([], 8)):
        rows.begin(ends)
        graph.replay()
        assert heat.tolist() == [total, 0, 0]


def test_loads_on_their_way_to_the_host():
    expected = torch.arange(15, dtype=torch.int32).view(3, 5)
    heat = list(expected.npu())
    snapshot = LoadSnapshot(heat)
    assert snapshot.is_there()
    assert snapshot.counts().tolist() == expected.tolist()
    assert not torch.stack(heat).any()
