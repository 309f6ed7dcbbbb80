# SPDX-License-Identifier: Apache-2.0
"""Why the plugin is active or not, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version

__all__ = ["Report", "examine", "inactive_because", "log_inactive"]

# The triple that fits together; the version of this package follows vLLM's.
REQUIRED = {"torch": "2.13.0", "torch-npu": "2.13.0", "vllm": "0.32.0"}
# The public index has another project of this name, and a vLLM for CUDA; a clone's settings build the right one.
ALL_THREE = "in a clone of the repository, `uv pip install ./packages/vllm-ascend` brings what fits"
NO_NPU = "install CANN on an Ascend host, or in a clone of the repository `uv pip install './packages/vllm-ascend[sim]'` for the simulated NPU"


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def inactive_because() -> str | None:
    """The reason, with the remedy, why there is no NPU to serve on; None where there is one."""
    for package, wanted in REQUIRED.items():
        found = installed(package)
        if found is None:
            return f"{package} is not installed; {ALL_THREE}"
        if found.split("+")[0] != wanted:
            return f"{package} {found} is installed, vllm-ascend {installed('vllm-ascend')} needs {wanted}; {ALL_THREE}"
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError) as error:
        return f"torch_npu does not load ({(str(error).strip() or repr(error)).splitlines()[-1]}); {NO_NPU}"
    if not torch.npu.is_available():
        return f"torch_npu sees no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES, or {NO_NPU}"
    return None


def log_inactive(reason: str) -> None:
    """Tell the user at vLLM's start, where vLLM itself would only say that it found no device."""
    print(f"vllm-ascend is inactive because {reason}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `vllm-ascend doctor` prints.

    Attributes:
        active: whether vLLM will serve on an NPU here.
        reason: why not, with the remedy; empty where active.
        versions: name -> version, "missing" for what is not installed.
        devices: names of the visible NPUs.
        simulated: whether ascend-sim stands in for CANN.
    """

    active: bool
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    simulated: bool = False

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def examine() -> Report:
    """Look at this environment. Loads torch and torch_npu; changes nothing."""
    reason = inactive_because()
    names = (
        "torch",
        "torch-npu",
        "vllm",
        "vllm-ascend",
        "ascend-comm",
        "ascend-eplb",
        "ascend-linear",
        "ascend-moe",
        "ascend-sim",
    )
    versions = {"Python": platform.python_version()} | {name: installed(name) or "missing" for name in names}
    devices: list[str] = []
    if not reason:
        torch = importlib.import_module("torch")
        devices = [torch.npu.get_device_name(index) for index in range(torch.npu.device_count())]
    simulated = _simulated()
    versions["CANN"] = "simulated" if simulated else _cann_version() if not reason else "missing"
    return Report(active=not reason, reason=reason or "", versions=versions, devices=devices, simulated=simulated)


def _simulated() -> bool:
    if importlib.util.find_spec("ascend_sim") is None:
        return False
    return bool(importlib.import_module("ascend_sim.loader").decide().active)


def _cann_version() -> str:
    utils = importlib.import_module("torch_npu.npu.utils")
    return str(utils.get_cann_version())
