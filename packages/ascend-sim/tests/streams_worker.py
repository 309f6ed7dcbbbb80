# SPDX-License-Identifier: Apache-2.0
"""Every check of lazy streams, in one process that ASCEND_SIM_STREAMS=lazy was set for. Writes the outcomes as JSON; test_streams.py reads them."""

import json
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch_npu

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def on_side(work):
    """A side stream, after `work` was called on it, and what that returned."""
    side = torch.npu.Stream()
    with torch.npu.stream(side):
        result = work()
    return side, result


def ones(*shape):
    return torch.ones(*shape, device="npu")


def is_nan(t):
    return bool(t.isnan().all())


def wait_by_stream(side):
    torch.npu.current_stream().wait_stream(side)


def wait_by_event(side):
    torch.npu.current_stream().wait_event(side.record_event())


def synchronise_event(side):
    side.record_event().synchronize()


def query_event(side):
    assert side.record_event().query()


def synchronise_stream(side):
    side.synchronize()


def query_stream(side):
    assert side.query()


def synchronise_device(_side):
    torch.npu.synchronize()


@check
def every_way_to_wait():
    for wait in (
        wait_by_stream,
        wait_by_event,
        synchronise_event,
        query_event,
        synchronise_stream,
        query_stream,
        synchronise_device,
    ):
        x = ones(2, 3)
        side, y = on_side(lambda x=x: (x + 1) * 2)
        assert is_nan(y), wait.__name__
        wait(side)
        assert y.eq(4).all(), wait.__name__


@check
def the_default_stream_is_never_late():
    assert (ones(2) + 1).eq(2).all()


@check
def work_runs_in_the_order_of_its_stream():
    x = ones(4)

    def work():
        y = x.view(2, 2).t().contiguous()
        y[0].mul_(3)
        y.add_(1)
        first, second = y.split(1)
        return torch.cat([second, first])

    side, y = on_side(work)
    assert is_nan(y)
    side.synchronize()
    assert y.tolist() == [[2, 2], [4, 4]]


@check
def a_side_stream_waits_for_another():
    x = ones(3)
    one, y = on_side(lambda: x + 1)
    other = torch.npu.Stream()
    other.wait_stream(one)
    with torch.npu.stream(other):
        z = y * 2
    assert is_nan(y)
    other.synchronize()
    assert z.eq(4).all()
    assert y.eq(2).all()


@check
def a_side_stream_that_does_not_wait_for_another():
    x = ones(3)
    _one, y = on_side(lambda: x + 1)
    other, z = on_side(lambda: y * 2)
    other.synchronize()
    assert is_nan(z)


@check
def an_operand_that_is_overwritten_too_early():
    x = ones(3)
    side, y = on_side(lambda: x + 1)
    x.fill_(7)
    side.synchronize()
    assert y.eq(8).all()


@check
def an_event_that_is_recorded_too_early():
    x, side = ones(3), torch.npu.Stream()
    with torch.npu.stream(side):
        event = side.record_event()
        y = x + 1
    event.synchronize()
    assert is_nan(y)


@check
def copies_to_the_host():
    x = ones(3)
    pinned = torch.zeros(3).pin_memory()
    side, copy = on_side(lambda: (x + 1).to("cpu", non_blocking=True))
    with torch.npu.stream(side):
        pinned.copy_(x, non_blocking=True)
        copied = side.record_event()
    assert copy.isnan().all()
    assert pinned.isnan().all()
    copied.synchronize()
    assert copy.tolist() == [2, 2, 2]
    assert pinned.tolist() == [1, 1, 1]


@check
def blocking_copies_wait_for_their_own_stream():
    x = ones(3)
    _side, copy = on_side(lambda: (x + 1).cpu())
    assert copy.tolist() == [2, 2, 2]
    _side, number = on_side(lambda: (x.sum() + 1).item())
    assert number == 4
    pageable = torch.zeros(3)
    _side, _ = on_side(lambda: pageable.copy_(x + 1, non_blocking=True))
    assert pageable.tolist() == [2, 2, 2]


@check
def copies_from_the_host():
    pinned = torch.zeros(3).pin_memory()
    side, x = on_side(lambda: pinned.to("npu", non_blocking=True))
    pinned.fill_(5)
    assert is_nan(x)
    side.synchronize()
    assert x.eq(5).all(), "pinned memory was overwritten before it was read"
    _side, x = on_side(lambda: torch.zeros(3).to("npu", non_blocking=True))
    assert x.eq(0).all(), "memory that is not pinned is read at once"


@check
def kernels_of_torch_npu():
    x, weight = ones(2, 64).to(torch.bfloat16), ones(64).to(torch.bfloat16)
    side, (y, _) = on_side(lambda: torch_npu.npu_rms_norm(x, weight, 1e-6))
    assert is_nan(y)
    side.synchronize()
    assert y.eq(1).all()


@check
def shapes_that_depend_on_numbers():
    x = ones(3)
    _side, places = on_side(lambda: (x + 1).nonzero())
    assert places.flatten().tolist() == [0, 1, 2]


@check
def random_numbers_are_those_of_the_default_stream():
    torch.npu.manual_seed(7)
    expected = torch.empty(5, device="npu").uniform_()
    torch.npu.manual_seed(7)
    side, drawn = on_side(lambda: torch.empty(5, device="npu").uniform_())
    side.synchronize()
    assert drawn.equal(expected)


@check
def what_is_wrong_with_a_call():
    x = ones(2, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        on_side(lambda: x @ x)
    index = torch.full((1,), 9, device="npu")
    side, _ = on_side(lambda: x.index_select(0, index))
    with pytest.raises(RuntimeError, match=r"an operator of a side stream failed.*index out of range"):
        side.synchronize()
    side.synchronize()


@check
def collectives():
    x = ones(3)
    work = dist.all_reduce(x, async_op=True)
    assert is_nan(x)
    work.wait()
    assert x.eq(1).all()
    gathered = torch.zeros(3, device="npu")
    work = dist.all_gather_into_tensor(gathered, x, async_op=True)
    assert is_nan(gathered)
    torch.npu.synchronize()
    assert gathered.eq(1).all()
    dist.all_reduce(gathered)
    assert gathered.eq(1).all()


@check
def collectives_of_a_side_stream():
    x = ones(3)

    def work():
        y = x + 1
        dist.all_reduce(y)
        return y * 2

    side, y = on_side(work)
    assert is_nan(y)
    wait_by_stream(side)
    assert y.eq(4).all()


def main(results, store):
    dist.init_process_group("hccl", init_method=store, rank=0, world_size=1)
    outcomes = {}
    for name, function in CHECKS.items():
        try:
            function()
            outcomes[name] = "ok"
        except Exception:  # reported by test_streams.py
            outcomes[name] = traceback.format_exc()
        torch.npu.synchronize()
    dist.destroy_process_group()
    Path(results).write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
