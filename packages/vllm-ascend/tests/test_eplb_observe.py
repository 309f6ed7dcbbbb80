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


def test_a_step_without_requests_counts_nothing():
    assert counted_rows([], 3, "all").tolist() == [0, 0, 0]
    heat = torch.zeros(4, dtype=torch.int32, device="npu")
    for ends in (None, []):
        CountedRows("all").add(heat, torch.zeros(3, 2, dtype=torch.int32, device="npu"), ends)
    assert not heat.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_layers_add_their_own_choices_with_one_kernel_each(dtype):
    from ascend_sim import counters

    generator = torch.Generator().manual_seed(0)
    counted, steps = CountedRows("decode"), [list(ENDS), [2, 3, 9]]
    heat = [torch.zeros(5, dtype=torch.int32, device="npu") for _ in range(3)]
    expected = np.zeros((3, 5), np.int64)
    for ends in steps:
        weights = slowly(ends, 12, "decode", 0)
        for layer in range(3):
            ids = torch.randint(5, (12, 2), generator=generator, dtype=dtype)
            for row, chosen in zip(weights, ids.tolist(), strict=True):
                for expert in chosen:
                    expected[layer, expert] += row
            on_device = ids.npu()
            before = counters.snapshot().operators
            counted.add(heat[layer], on_device, ends)
            after = counters.snapshot().operators
            called = {
                name: count.calls - (before[name].calls if name in before else 0)
                for name, count in after.items()
                if name not in before or count.calls > before[name].calls
            }
            computing = {name: calls for name, calls in called.items() if "copy" not in name and "pin" not in name}
            if layer:  # the first layer of a step also brings the weights of its rows
                assert computing == {"aten::index_add_": 1}, called
    assert torch.stack(heat).tolist() == expected.tolist()
    snapshot = LoadSnapshot(heat)
    assert snapshot.is_there()
    assert snapshot.counts().tolist() == expected.tolist()
    assert not torch.stack(heat).any()
