# SPDX-License-Identifier: Apache-2.0
"""Physical memory that is mapped into reserved addresses: torch_npu's segments that grow, and CANN's functions below them."""

import ctypes
import json
import os
import re
import subprocess
import sys

import pytest
import torch

MIB = 1 << 20
PAGE = 2 * MIB
SEGMENT = 20 * MIB  # what torch_npu asks for at a time, for large blocks

ALLOCATIONS = """
import gc, json, torch
def free(): return torch.npu.mem_get_info()[0]
found = {"free": [free()]}
small, large = torch.ones(100, device="npu"), [torch.ones(9 << 20, dtype=torch.uint8, device="npu")]
found["free"].append(free())
large.append(torch.full((39 << 20,), 2, dtype=torch.uint8, device="npu"))
found["free"].append(free())
found["segments"] = [(s["segment_type"], s["is_expandable"], s["total_size"]) for s in torch.npu.memory_snapshot()]
found["sums"] = [t.sum().item() for t in large]
try:
    torch.empty(300 << 20, device="npu", dtype=torch.uint8)
except torch.OutOfMemoryError as error:
    found["refused"] = str(error)
large.clear()
gc.collect()
torch.npu.empty_cache()
found["free"].append(free())
found["usable"] = small.sum().item(), torch.ones(30 << 20, dtype=torch.uint8, device="npu").sum().item()
print(json.dumps(found))
"""


def allocations(setting):
    """What a process found that has 256 MiB and this setting of its allocator, and what it wrote to standard error."""
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    environment |= {"PYTORCH_NPU_ALLOC_CONF": setting, "ASCEND_SIM_MEMORY": "256MiB"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALLOCATIONS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def growing():
    return allocations("expandable_segments:True")


@pytest.fixture(scope="module")
def ordinary():
    return allocations("expandable_segments:False")


def test_segments_grow(growing, ordinary):
    assert sorted(growing[0]["segments"]) == [["large", True, 3 * SEGMENT], ["small", True, PAGE]]
    assert growing[0]["sums"] == [9 * MIB, 2 * 39 * MIB]
    assert len(ordinary[0]["segments"]) == 3
    assert not any(expandable for _, expandable, _ in ordinary[0]["segments"])


def test_memory_is_counted_as_it_is_mapped(growing):
    before, one, three, after = growing[0]["free"]
    assert before == 256 * MIB
    assert before - one == PAGE + SEGMENT
    assert one - three == 2 * SEGMENT
    assert after == before - PAGE  # the small tensor's
    assert growing[0]["usable"] == [100.0, 30 * MIB]


def test_out_of_memory_reads_as_with_ordinary_segments(growing, ordinary):
    # 300 MiB and their padding, up to the next 2 MiB; what the allocator cuts off a block depends on the kind of segment.
    begin = r"NPU out of memory\. Tried to allocate 302\.00 MiB \(NPU 0; 256\.00 MiB total capacity; 4[89]\.00 MiB already allocated; "
    for found, _ in (growing, ordinary):
        assert re.match(begin, found["refused"]), found["refused"]
    assert re.sub(r"\d+\.\d\d", "", growing[0]["refused"]) == re.sub(r"\d+\.\d\d", "", ordinary[0]["refused"])


def test_no_warning_of_a_driver_without_such_segments(growing, ordinary):
    def messages(said):
        return [re.sub(r"\[W\S+ \S+|E\d+ \S+ +\d+|\d+\.\d\d", "", line) for line in said.splitlines()]

    assert messages(growing[1]) == messages(ordinary[1])
    assert "expandable_segments" not in growing[1]


# CANN's functions


class Location(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("type", ctypes.c_int))


class Properties(ctypes.Structure):
    """aclrtPhysicalMemProp, all 0 but for the location."""

    _fields_ = (
        ("handle_type", ctypes.c_int),
        ("allocation_type", ctypes.c_int),
        ("attribute", ctypes.c_int),
        ("location", Location),
        ("reserve", ctypes.c_uint64),
    )


HOST, DEVICE = 0, 1


class Driver:
    """CANN's functions, each an AssertionError where it fails; and what they said."""

    def __init__(self):
        self._library = ctypes.CDLL("libascendcl.so")
        self._library.aclGetRecentErrMsg.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        """None, or why the call was refused."""
        size = {int: ctypes.c_size_t}
        status = getattr(self._library, name)(*(size.get(type(one), lambda x: x)(one) for one in arguments))
        return self._library.aclGetRecentErrMsg().decode() if status else None

    def reserve(self, size):
        address = ctypes.c_void_p()
        assert self.call("aclrtReserveMemAddress", ctypes.byref(address), size, 0, None, 1) is None
        return address.value

    def physical(self, size, location=(0, DEVICE)):
        """A handle, or why there is none."""
        handle = ctypes.c_void_p()
        why = self.call(
            "aclrtMallocPhysical", ctypes.byref(handle), size, ctypes.byref(Properties(location=Location(*location))), 0
        )
        return why or handle


@pytest.fixture
def driver():
    torch.npu.init()
    return Driver()


def test_what_is_mapped_can_be_written(driver):
    place, handle = driver.reserve(3 * PAGE), driver.physical(PAGE)
    assert place % PAGE == 0
    assert driver.call("aclrtMapMem", place + PAGE, PAGE, 0, handle, 0) is None
    ctypes.memset(place + PAGE, 7, PAGE)
    assert ctypes.string_at(place + PAGE, PAGE) == b"\7" * PAGE
    assert driver.call("aclrtUnmapMem", place + PAGE) is None
    assert driver.call("aclrtMapMem", place, PAGE, 0, handle, 0) is None
    assert driver.call("aclrtUnmapMem", place) is None
    assert driver.call("aclrtFreePhysical", handle) is None
    assert driver.call("aclrtReleaseMemAddress", place) is None


def test_physical_memory_is_counted_and_limited(driver):
    free = torch.npu.mem_get_info()[0]
    handle = driver.physical(5 * PAGE)
    assert torch.npu.mem_get_info()[0] == free - 5 * PAGE
    assert "out of device memory" in driver.physical(free // PAGE * PAGE)
    assert driver.call("aclrtFreePhysical", handle) is None
    assert torch.npu.mem_get_info()[0] == free


def test_mistakes_are_refused(driver):
    place, handle, other = driver.reserve(4 * PAGE), driver.physical(2 * PAGE), driver.physical(2 * PAGE)
    assert "multiple of 2 MiB" in driver.physical(PAGE + 1)
    assert "only memory of a device" in driver.physical(PAGE, (0, HOST))
    assert "not reserved" in driver.call("aclrtMapMem", place + 3 * PAGE, 2 * PAGE, 0, handle, 0)
    assert "the whole" in driver.call("aclrtMapMem", place, PAGE, 0, handle, 0)
    assert driver.call("aclrtMapMem", place, 2 * PAGE, 0, handle, 0) is None
    assert "in use" in driver.call("aclrtMapMem", place + PAGE, 2 * PAGE, 0, other, 0)
    assert "one place at a time" in driver.call("aclrtMapMem", place + 2 * PAGE, 2 * PAGE, 0, handle, 0)
    assert "still mapped" in driver.call("aclrtFreePhysical", handle)
    assert "still mapped" in driver.call("aclrtReleaseMemAddress", place)
    assert "nothing was mapped" in driver.call("aclrtUnmapMem", place + PAGE)
    assert driver.call("aclrtUnmapMem", place) is None
    for one in (handle, other):
        assert driver.call("aclrtFreePhysical", one) is None
        assert "no physical memory" in driver.call("aclrtFreePhysical", one)
    assert driver.call("aclrtReleaseMemAddress", place) is None
    assert "begin here" in driver.call("aclrtReleaseMemAddress", place)
