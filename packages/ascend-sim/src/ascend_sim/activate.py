# SPDX-License-Identifier: Apache-2.0
"""Puts the simulator's operators and its `hccl` backend in place, right after `import torch_npu`."""

from __future__ import annotations

import functools
import importlib

import torch

from ascend_sim import build, loader

__all__ = ["activate"]


@functools.cache  # registering kernels twice is an error
def activate() -> None:
    """Load the compiled kernels, replace torch_npu's, and put the Gloo-backed `hccl` in the place of HCCL."""
    if loader.streams() == "lazy":
        importlib.import_module("torch._meta_registrations")  # the shapes of results before they are computed
    torch.ops.load_library(str(build.native()))  # type: ignore[no-untyped-call]  # torch's own lack
    torch.ops.ascend_sim.install()
    from ascend_sim import hccl

    hccl.install()
