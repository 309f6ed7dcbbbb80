# SPDX-License-Identifier: Apache-2.0
"""Decides whether the simulator is needed, and puts it in place around `import torch` and `import torch_npu`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import io
import os
import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from ascend_sim import build
from ascend_sim.messages import say

__all__ = [
    "Decision",
    "before_torch",
    "decide",
    "device_bytes",
    "device_count",
    "memory_bytes",
    "soc_name",
    "streams",
    "strict",
    "torch_spec",
    "watched_spec",
]

# Libraries that torch_npu names in its NEEDED entries or opens at run time. libascendcl answers for all of them.
SONAMES = (
    "libhccl",
    "libacl_op_compiler",
    "libge_runner",
    "libgraph",
    "libacl_tdt_channel",
    "libopapi",
    "libruntime",
    "libmsprofiler",
    "libascend_hal",
)
CANN_FOLDERS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest")
SMALLEST_MEMORY = 32 << 20
LARGEST_MEMORY = 1 << 46  # half of what a process can address
SOC_NAMES = ("Ascend910B3", "Ascend910_9391")  # Atlas A2, Atlas A3
NOT_SET = "Warning: ASCEND_HOME_PATH environment variable is not set.\n"  # torch_npu says this on standard output
UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class Decision:
    """Whether the simulator runs in this process, and why.

    Attributes:
        active: the simulator answers for CANN.
        reason: one clause that ends the sentence "active/inactive because ...".
        problem: what keeps the simulator from running although it is needed, with the remedy; "" where nothing does.
    """

    __slots__ = ("active", "problem", "reason")

    def __init__(self, active: bool, reason: str, problem: str = "") -> None:
        """Store the three facts."""
        self.active, self.reason, self.problem = active, reason, problem


def find_cann() -> Path | None:
    """Folder of a real CANN's `libascendcl.so`, or None."""
    roots = [os.environ.get(name) for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")]
    folders = [Path(root, sub) for root in [*roots, *CANN_FOLDERS] if root for sub in ("lib64", "runtime/lib64")]
    folders += [Path(entry) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    # os.path.exists is False where a folder cannot be looked into.
    return next((folder for folder in folders if os.path.exists(folder / "libascendcl.so")), None)


def decide() -> Decision:
    """Say whether the simulator is needed, and what is wrong with its variables. Reads the environment and looks for CANN; changes nothing."""
    switch = os.environ.get("ASCEND_SIM", "")
    if switch not in ("", "0", "1"):
        wrong = f"ASCEND_SIM is {switch!r}; allowed: 0 (off), 1 (on), unset (on where there is no CANN)"
        return Decision(False, wrong, problem=wrong)
    if switch == "0":
        return Decision(False, "ASCEND_SIM=0 switches it off")
    if PathFinder.find_spec("torch_npu") is None:
        return Decision(False, "torch-npu is not installed (pip install torch-npu==2.13.0)")
    if switch != "1" and (cann := find_cann()):
        return Decision(False, f"a real CANN is in {cann}")
    if problem := _wrong_variable():
        return Decision(False, problem, problem=problem)
    return Decision(True, "ASCEND_SIM=1 asks for it" if switch == "1" else "there is no CANN on this host")


def _wrong_variable() -> str:
    """What is wrong with one of the simulator's variables; "" where nothing is."""
    try:
        strict(), soc_name(), device_count(), device_bytes(), streams()
    except ValueError as error:
        return str(error)
    return ""


def memory_bytes(text: str) -> int:
    """Bytes of a size such as "4GiB", "512 MiB" or "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in UNITS:
        raise ValueError(f"ASCEND_SIM_MEMORY is {text!r}; allowed: a number with one of KiB, MiB, GiB, such as 4GiB")
    size = min(float(match[1]) * UNITS[match[2]], 2.0 * LARGEST_MEMORY)  # a number of 400 digits is infinite as a float
    if size > LARGEST_MEMORY:
        raise ValueError(f"ASCEND_SIM_MEMORY is {text!r}; allowed: at most {LARGEST_MEMORY >> 30}GiB")
    if size < SMALLEST_MEMORY:
        raise ValueError(
            f"ASCEND_SIM_MEMORY is {text!r}; allowed: at least 32MiB, which torch_npu's allocator takes at a time"
        )
    return int(size)


def device_count() -> int:
    """Number of simulated devices: ASCEND_SIM_DEVICES, or 8."""
    text = os.environ.get("ASCEND_SIM_DEVICES", "8")
    if not re.fullmatch(r"[0-9]{1,2}", text) or not 1 <= int(text) <= 64:
        raise ValueError(f"ASCEND_SIM_DEVICES is {text!r}; allowed: 1 to 64")
    return int(text)


def device_bytes() -> int:
    """Memory of each simulated device: ASCEND_SIM_MEMORY, or 4 GiB."""
    return memory_bytes(os.environ.get("ASCEND_SIM_MEMORY", "4GiB"))


def soc_name() -> str:
    """Name of the simulated chip: ASCEND_SIM_SOC, or Ascend910B3. It changes the name, which products choose by, and the rules of kernels that differ between chips."""
    name = os.environ.get("ASCEND_SIM_SOC", "Ascend910B3")
    if name not in SOC_NAMES:
        raise ValueError(f"ASCEND_SIM_SOC is {name!r}; allowed: {', '.join(SOC_NAMES)}")
    return name


def strict() -> bool:
    """Whether kernels reject what hardware rejects: ASCEND_SIM_STRICT, or yes."""
    text = os.environ.get("ASCEND_SIM_STRICT", "1")
    if text not in ("0", "1"):
        raise ValueError(f"ASCEND_SIM_STRICT is {text!r}; allowed: 1 (as hardware), 0 (relaxed)")
    return text == "1"


def streams() -> str:
    """When the work of side streams is done: ASCEND_SIM_STREAMS, or "immediate"."""
    text = os.environ.get("ASCEND_SIM_STREAMS") or "immediate"
    if text not in ("immediate", "lazy"):
        raise ValueError(
            f"ASCEND_SIM_STREAMS is {text!r}; allowed: immediate (when it is called), lazy (when something waits for it)"
        )
    return text


def torch_spec(name: str) -> ModuleSpec | None:
    """torch's own spec, with a loader that puts the simulator in place around it; None where that is not needed, or done already."""
    decision = decide()
    spec = PathFinder.find_spec(name)
    if name in sys.modules or not (decision.active or decision.problem) or spec is None or spec.origin is None:
        return None
    spec.loader = _Torch(name, spec.origin)
    return spec


def before_torch() -> str:
    """Put the stub of CANN in the process, once, if the simulator is needed here, and compile what is not compiled.

    Returns:
        Why it is needed and cannot be had, with the remedy; "" where all is well.
    """
    global _prepared, _problem
    decision = decide()
    if _prepared or not (decision.active or decision.problem):
        return _problem
    _prepared, _problem = True, decision.problem
    if not _problem:
        try:
            _put_stub_in_place()
            if _loads_backends():
                build.native()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            _problem = str(error).removeprefix("ascend-sim: ") or type(error).__name__
    return _problem


def _put_stub_in_place() -> None:
    os.environ["ASCEND_SIM_SOC"] = soc_name()
    os.environ["ASCEND_SIM_DEVICES"] = str(device_count())
    os.environ["ASCEND_SIM_MEMORY_BYTES"] = str(device_bytes())
    os.environ["TASK_QUEUE_ENABLE"] = "0"  # torch_npu's launch thread would run beside the CPU kernels
    folder = build.runtime(SONAMES)
    for name in ("libascendcl", *SONAMES):
        ctypes.CDLL(str(folder / f"{name}.so"), mode=ctypes.RTLD_GLOBAL)


_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # torch's own switch
_prepared = False
_problem = ""
"""Whether `before_torch` has run in this process, and what it found."""


def _loads_backends() -> bool:
    return os.environ.get(_AUTOLOAD, "1") == "1"


class _Torch(importlib.machinery.SourceFileLoader):
    """Loads torch, and lets it load torch_npu only where that can work: `import torch` never fails for want of a simulator."""

    def exec_module(self, module: ModuleType) -> None:
        problem = before_torch()
        if not problem or not _loads_backends():
            super().exec_module(module)
        else:
            given = os.environ.get(_AUTOLOAD)
            os.environ[_AUTOLOAD] = "0"
            try:
                super().exec_module(module)
            finally:  # other processes decide for themselves
                del os.environ[_AUTOLOAD]
                if given is not None:
                    os.environ[_AUTOLOAD] = given
        if problem:
            module.npu = _Absent(problem)  # type: ignore[attr-defined]
            say(_absent(problem))


class _Absent(ModuleType):
    """`torch.npu` where there is no simulated NPU: every use of it says why."""

    def __init__(self, problem: str) -> None:
        super().__init__("torch.npu")
        self.__dict__["_problem"] = problem

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(_absent(self.__dict__["_problem"]))


def _absent(problem: str) -> str:
    return f"ascend-sim: there is no simulated NPU in this process: {problem}"


class _Refusing(importlib.machinery.SourceFileLoader):
    """torch_npu where there is no simulated NPU: without CANN its own import would fail for want of a library."""

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(_absent(_problem), name="torch_npu")


class _Watched(importlib.machinery.SourceFileLoader):
    """Loads torch_npu as ever, then puts the operators in place."""

    def exec_module(self, module: ModuleType) -> None:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                super().exec_module(module)
        finally:  # standard output belongs to the program, and here it is right that the variable is not set
            left = said.getvalue().replace(NOT_SET, "")
            with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be full, closed or None
                sys.stdout.write(left)
        from ascend_sim import activate

        activate.activate()


def watched_spec(name: str) -> ModuleSpec | None:
    """torch_npu's own spec, with a loader that activates the operators afterwards; None where the simulator is not needed."""
    spec = PathFinder.find_spec(name)
    decision = decide()
    if spec is None or spec.origin is None or not (decision.active or decision.problem):
        return None
    spec.loader = _Refusing(name, spec.origin) if _problem else _Watched(name, spec.origin)
    return spec
