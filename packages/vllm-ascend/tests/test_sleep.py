# SPDX-License-Identifier: Apache-2.0
"""Device memory that is given back and taken again, without an engine. Engines that sleep are in test_adapters.py."""

import gc

import pytest
import torch

MIB = 1 << 20


def used():
    """Bytes of the device that are taken, by CANN's count."""
    torch.npu.synchronize()
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    return total - free


@pytest.fixture(params=[False, True], ids=["fixed segments", "segments that grow"])
def memory(request):
    """A pool; the tensors of a test and its memory end before the next one begins."""
    from vllm_ascend.device import let_segments_grow
    from vllm_ascend.sleep.pool import SleepingMemory

    torch.npu.set_device(0)
    torch.zeros(1, device="npu")
    gc.collect()  # other files' tests may have left cycles with tensors
    before = used()
    let_segments_grow(request.param)
    made = SleepingMemory(segments_grow=request.param)
    yield made
    assert grows() == request.param
    let_segments_grow(False)
    made.close()
    gc.collect()
    assert made._segments == {}
    assert used() == before


def grows():
    """Whether what is allocated outside of pools lies in segments that grow."""
    torch.npu.empty_cache()
    probe = bytes_of(30 * MIB)
    segments = torch.npu.memory.memory_snapshot()
    return next(
        one["is_expandable"] for one in segments if probe.data_ptr() in (part["address"] for part in one["blocks"])
    )


def bytes_of(size, value=1):
    return torch.full((size,), value, dtype=torch.int8, device="npu")


def keep_all(tag, address):
    return False


def test_what_lies_there_comes_back_at_its_address(memory):
    assert grows() == memory._segments_grow
    outside = bytes_of(MIB, 7)
    with memory.pool("weights"):
        large, small = torch.arange(20 * MIB, device="npu", dtype=torch.float32), torch.arange(3.0, device="npu")
    awake, addresses = used(), (large.data_ptr(), small.data_ptr())
    expected = large.cpu(), small.cpu()
    memory.sleep(keep_all)
    assert used() <= awake - 80 * MIB
    assert memory.sleeping_bytes() >= 80 * MIB
    assert (outside == 7).all()  # what was allocated beside it does not sleep
    memory.wake()
    assert used() == awake
    assert (large.data_ptr(), small.data_ptr()) == addresses
    assert torch.equal(large.cpu(), expected[0])
    assert torch.equal(small.cpu(), expected[1])


def test_tags_sleep_and_wake_apart(memory):
    with memory.pool("runtime"):
        table = bytes_of(3 * MIB, 5)
        with memory.pool("kv_cache"):
            cache = bytes_of(40 * MIB, 6)
        state = bytes_of(MIB, 7)
    with memory.pool("weights"):
        weight = bytes_of(24 * MIB, 8)
    assert memory.tags() == {"runtime", "kv_cache", "weights"}
    memory.sleep(lambda tag, address: tag == "kv_cache")
    memory.wake(("weights", "runtime"))
    assert memory.sleeping_bytes() == memory.sleeping_bytes(("kv_cache",)) >= 40 * MIB
    for tensor, value in ((table, 5), (state, 7), (weight, 8)):
        assert (tensor == value).all()
    memory.wake()
    assert memory.sleeping_bytes() == 0
    cache.fill_(9)
    assert (cache == 9).all()
    memory.sleep(keep_all, ("weights",))
    assert (cache == 9).all()
    memory.wake()
    assert (weight == 8).all()


def test_one_allocation_of_a_segment_is_discarded(memory):
    """Neighbours in one segment of the allocator."""
    with memory.pool("weights"):
        parts = [bytes_of(300_000, value) for value in range(1, 6)]
    lost = parts[2].data_ptr()
    memory.sleep(lambda tag, address: address == lost)
    memory.wake()
    assert [bool((part == value).all()) for value, part in enumerate(parts, 1) if value != 3] == [True] * 4


def test_what_only_loading_needed_is_given_back(memory):
    before = used()
    with memory.pool("weights"):
        kept = bytes_of(24 * MIB)
        passing = bytes_of(60 * MIB)
        del passing
    assert used() - before < 60 * MIB
    memory.sleep(keep_all)
    later = kept
    del kept, later
    memory.wake()
    memory.sleep(keep_all)  # nothing lies there any more
    assert used() - before <= 2 * MIB
    memory.wake()
    assert used() - before <= 2 * MIB


def test_memory_does_not_grow(memory):
    with memory.pool("weights"):
        weight = torch.arange(1 << 20, device="npu")
    with memory.pool("kv_cache"):
        cache = bytes_of(16 * MIB)
    awake, asleep = used(), set()
    for _ in range(20):
        memory.sleep(lambda tag, address: tag == "kv_cache")
        asleep.add(used())
        memory.wake()
        assert used() == awake
    assert len(asleep) == 1
    assert torch.equal(weight.cpu(), torch.arange(1 << 20))
    cache.zero_()


@pytest.mark.slow
@pytest.mark.long
def test_a_device_that_has_no_room_to_wake_up(memory):
    """Then what sleeps can still be woken later."""
    with memory.pool("weights"):
        weight = bytes_of(256 * MIB, 3)
    memory.sleep(keep_all)
    free, _ = torch.npu.mem_get_info()
    other = bytes_of(free - 128 * MIB, 1)
    with pytest.raises(
        RuntimeError,
        match=r"cannot wake up: \d+ bytes of NPU 0 are still to be taken, and \d+ are free; end what else uses it",
    ):
        memory.wake()
    del other
    torch.npu.empty_cache()
    memory.wake()
    assert (weight == 3).all()


def test_no_room_for_what_is_allocated(memory):
    """It is torch's own error, and what was allocated before is as it was."""
    with memory.pool("weights"):
        weight = bytes_of(MIB, 3)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 40, dtype=torch.int8, device="npu")
    assert (weight == 3).all()


def test_levels_and_tags_that_do_not_exist():
    from vllm_ascend.sleep.backend import AscendSleepBackend

    backend = AscendSleepBackend()
    with pytest.raises(ValueError, match=r"sleep level \(3\) must be 1 .* or 2"):
        backend.suspend(3)
    with pytest.raises(ValueError, match=r"wake-up tags \['cache'\] must be of weights, kv_cache"):
        backend.resume(["weights", "cache"])


def test_levels_of_a_model():
    """Parameters are lost at level 2 and nothing else of the weights is; the KV cache at both."""
    from vllm_ascend.sleep.backend import AscendSleepBackend

    backend = AscendSleepBackend()
    with backend.pool("weights"):
        model = torch.nn.Linear(1000, 1000, bias=False, device="npu", dtype=torch.float32)
        derived = model.weight.detach() * 2
    expected = model.weight.detach().cpu().clone(), derived.cpu().clone()
    backend.parameters = model.parameters
    before = used()
    backend.suspend(1)
    assert backend.state() == "SUSPENDED"
    backend.resume(["kv_cache"])
    assert backend.state() == "SUSPENDED"
    backend.resume()
    assert backend.state() == "RUNNING"
    assert torch.equal(model.weight.cpu(), expected[0])
    backend.suspend(2)
    assert used() < before
    backend.resume(["weights"])
    assert backend.state() == "RUNNING"
    assert not torch.equal(model.weight.cpu(), expected[0])
    assert torch.equal(derived.cpu(), expected[1])
