# SPDX-License-Identifier: Apache-2.0
"""Addresses on a device, and physical memory that is mapped there: CANN's runtime, which torch_npu has loaded, called through ctypes.

Source: `acl/acl_rt.h`, which the wheel of torch-npu brings.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

__all__ = ["PAGE", "map_memory", "release", "reserve", "to_device", "to_host", "unmap", "wait_for_device"]

PAGE = 2 << 20
"""Bytes of a huge page, of which physical memory is a multiple."""

_HUGE_PAGES = 4  # ACL_HBM_MEM_HUGE
_ON_DEVICE = 1  # ACL_MEM_LOCATION_TYPE_DEVICE
_HUGE_PAGE_ADDRESSES = 1  # the flag of a reservation
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2


class _Location(ctypes.Structure):
    _fields_ = [("id", c_uint32), ("type", c_int)]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("handle_type", c_int),
        ("allocation_type", c_int),
        ("attribute", c_int),
        ("location", _Location),
        ("reserve", c_uint64),
    ]


@cache
def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL("libascendcl.so")


def _call(name: str, *arguments: Any) -> None:
    """Call a function of CANN. RuntimeError with its name and error code where it fails."""
    if code := getattr(_runtime(), name)(*arguments):
        raise RuntimeError(f"{name} of CANN failed with error {code}")


def reserve(num_bytes: int) -> int:
    """Addresses, none of which can be used before memory is mapped there.

    Args:
        num_bytes: a multiple of `PAGE`.

    Returns:
        The first of them.

    Raises:
        RuntimeError: there are none left.
    """
    address = c_void_p()
    _call(
        "aclrtReserveMemAddress",
        ctypes.byref(address),
        c_size_t(num_bytes),
        c_size_t(0),
        None,
        c_uint64(_HUGE_PAGE_ADDRESSES),
    )
    assert address.value is not None  # CANN has reported success
    return address.value


def release(address: int) -> None:
    """Give addresses back, at which nothing is mapped."""
    _call("aclrtReleaseMemAddress", c_void_p(address))


def map_memory(address: int, num_bytes: int, device: int) -> c_void_p:
    """Map new physical memory of a device at reserved addresses.

    Returns:
        Its handle, for `unmap`.

    Raises:
        RuntimeError: the device has not so much left.
    """
    properties = _Properties(0, 0, _HUGE_PAGES, _Location(device, _ON_DEVICE), 0)
    handle = c_void_p()
    _call("aclrtMallocPhysical", ctypes.byref(handle), c_size_t(num_bytes), ctypes.byref(properties), c_uint64(0))
    try:
        _call("aclrtMapMem", c_void_p(address), c_size_t(num_bytes), c_size_t(0), handle, c_uint64(0))
    except RuntimeError:
        _call("aclrtFreePhysical", handle)
        raise
    return handle


def unmap(address: int, handle: c_void_p) -> None:
    """Give physical memory back. The addresses stay reserved."""
    _call("aclrtUnmapMem", c_void_p(address))
    _call("aclrtFreePhysical", handle)


def to_host(host: int, device: int, num_bytes: int) -> None:
    """Copy bytes from a device address to a host address, and wait for that."""
    size = c_size_t(num_bytes)
    _call("aclrtMemcpy", c_void_p(host), size, c_void_p(device), size, c_int(_DEVICE_TO_HOST))


def to_device(device: int, host: int, num_bytes: int) -> None:
    """Copy bytes from a host address to a device address, and wait for that."""
    size = c_size_t(num_bytes)
    _call("aclrtMemcpy", c_void_p(device), size, c_void_p(host), size, c_int(_HOST_TO_DEVICE))


def wait_for_device() -> None:
    """Wait for all that was launched on the current device."""
    _call("aclrtSynchronizeDevice")
