# SPDX-License-Identifier: Apache-2.0
"""The counters are exact, apart from each other, and can be subtracted. Traffic is checked in hccl_worker.py."""

import pytest
import torch
from ascend_sim import counters
from ascend_sim.counters import OperatorCount, Snapshot, TrafficCount
from rich.console import Console

NPU = torch.device("npu")


def test_calls_and_flops_of_a_block():
    a, b = torch.ones(3, 4, device=NPU), torch.ones(4, 5, device=NPU)
    with counters.counting() as work:
        torch.mm(a, b)
        torch.mm(a, b)
        torch.add(a, 1)
    torch.add(a, 1)
    assert work.delta.operators["aten::mm"] == OperatorCount(2, 2 * (2 * 3 * 4 * 5))
    assert work.delta.operators["aten::add"] == OperatorCount(1, 0)
    assert work.delta.flops == 240
    assert work.delta.calls == 3
    assert work.delta.bytes == 0


@pytest.mark.parametrize(
    ("run", "flops"),
    [
        (lambda t: torch.addmm(t(5), t(3, 4), t(4, 5)), 120),
        (lambda t: torch.bmm(t(2, 3, 4), t(2, 4, 5)), 240),
        (lambda t: torch.baddbmm(t(2, 3, 5), t(2, 3, 4), t(2, 4, 5)), 240),
        (lambda t: torch.mv(t(3, 4), t(4)), 24),
        (lambda t: torch.nn.functional.linear(t(2, 3, 4), t(5, 4), t(5)), 240),
        (lambda t: t(2, 3, 4) @ t(4, 5), 240),
        (lambda t: torch.mm(t(3, 0), t(0, 5)), 0),
        (lambda t: torch.mm(t(3, 4), t(4, 5), out=torch.empty(0, device=NPU)), 120),
        (lambda t: t(3, 4) + t(3, 4), 0),
    ],
)
def test_flops_of_matrix_products(run, flops):
    with counters.counting() as work:
        run(lambda *shape: torch.ones(*shape, device=NPU))
    assert work.delta.flops == flops


def test_a_running_block_and_an_error():
    ones = torch.ones(2, 3, device=NPU)
    with pytest.raises(ValueError, match="on purpose"), counters.counting() as work:
        raise ValueError("on purpose", work.delta, ones.neg())
    ones.neg()
    assert work.delta.operators == {"aten::neg": OperatorCount(1, 0)}
    with counters.counting() as work:
        assert not work.delta.operators
        ones.neg()
        assert work.delta.operators["aten::neg"].calls == 1


def test_reset_and_order_of_subtraction():
    torch.ones(2, device=NPU).neg()
    before = counters.snapshot()
    assert before.operators["aten::neg"].calls >= 1
    counters.reset()
    assert counters.snapshot() == Snapshot({}, {})
    with pytest.raises(ValueError, match="earlier"):
        counters.snapshot() - before


def test_kernels_in_python_may_count():
    with counters.counting() as work:
        torch.ops.ascend_sim.count("npu::mine", 10)
    assert work.delta.operators == {"npu::mine": OperatorCount(1, 10)}


def test_the_table_shows_sums_and_traffic():
    counts = Snapshot(
        {
            "aten::mm": OperatorCount(2, 3_000_000_000),
            "aten::add": OperatorCount(1500, 0),
            "aten::neg": OperatorCount(1, 0),
        },
        {("allreduce_", "tp"): TrafficCount(4, 1_234_567)},
    )
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(counters.table(counts, rows=2))
    shown = console.export_text()
    console.file.close()
    for text in ("aten::mm", "3.000", "1,500", "all 3", "1,503", "allreduce", "tp", "1,234,567"):
        assert text in shown
    assert "aten::neg" not in shown
