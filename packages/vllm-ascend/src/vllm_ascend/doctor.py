# SPDX-License-Identifier: Apache-2.0
"""Why the plugin is active or not, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vllm_ascend import cann, multimodal
from vllm_ascend.installed import installed

__all__ = ["Report", "examine", "inactive_because", "log_inactive"]

# The triple that fits together; the version of this package follows vLLM's.
REQUIRED = {"torch": "2.13.0", "torch-npu": "2.13.0", "vllm": "0.32.0"}
# The public index has another project of this name, and a vLLM for CUDA; a clone's settings build the right one.
ALL_THREE = "in a clone of the repository, `uv pip install ./packages/vllm-ascend` brings what fits"
NO_NPU = (
    "on an Ascend host install CANN and source its set_env.sh; elsewhere, in a clone of the repository, "
    "`uv pip install './packages/vllm-ascend[sim]'` brings the simulated NPU"
)
CANN_SCRIPTS = ("/usr/local/Ascend/ascend-toolkit/set_env.sh", "/usr/local/Ascend/cann/set_env.sh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulator:
    """What ascend-sim says of itself.

    Attributes:
        installed: whether it is there.
        active: whether it answers for CANN in this process.
        reason: why it is active or not, as a clause.
        problem: which of its variables cannot be understood, with the value and what is allowed; empty where there is none.
    """

    installed: bool = False
    active: bool = False
    reason: str = ""
    problem: str = ""


def inactive_because() -> str | None:
    """The reason, with the remedy, why there is no NPU to serve on; None where there is one."""
    for package, wanted in REQUIRED.items():
        found = installed(package)
        if found is None:
            return f"{package} is not installed; {ALL_THREE}"
        if found.split("+")[0] != wanted:
            return f"{package} {found} is installed, vllm-ascend {installed('vllm-ascend')} needs {wanted}; {ALL_THREE}"
    simulator = _simulator()
    if simulator.problem:
        return f"{simulator.problem}; set it to what is allowed, or unset it"
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        cause = _cause(error)
        if simulator.active:  # it says itself what to do
            return f"the simulated NPU does not run: {str(cause).strip() or repr(cause)}"
        return f"torch_npu does not load ({(str(cause).strip() or repr(cause)).splitlines()[-1]}); {_remedy(simulator)}"
    if not torch.npu.is_available():
        from vllm_ascend import envs

        if (named := envs.visible_devices()) is not None:
            return f"torch_npu sees no NPU with ASCEND_RT_VISIBLE_DEVICES={named!r}; name devices that `npu-smi info` lists, or unset it"
        return f"torch_npu sees no NPU; check `npu-smi info`; {NO_NPU}"
    return None


def _cause(error: BaseException) -> BaseException:
    """The first of the errors that led to `error`: torch reports a library that is missing as a backend extension that failed."""
    seen = {id(error)}
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        if id(inner) in seen:
            break
        seen.add(id(inner))
        error = inner
    return error


def _remedy(simulator: Simulator) -> str:
    """What to do where torch_npu finds no CANN."""
    if script := next((path for path in CANN_SCRIPTS if Path(path).exists()), None):
        return f"run `source {script}`, for CANN is installed and not in this environment"
    if simulator.installed and not simulator.active:
        return f"the simulated NPU is installed and not active because {simulator.reason}; {NO_NPU}"
    return NO_NPU


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
        not_installed: which libraries of multimodal models are not installed, with the remedy; empty where all are.
        simulated: whether ascend-sim stands in for CANN.
        notes: sentences about what may not work, and what to do about it.
    """

    active: bool
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    not_installed: str = ""
    simulated: bool = False
    notes: list[str] = field(default_factory=list)

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
        "torchvision",
    )
    versions = {"Python": platform.python_version()} | {name: installed(name) or "missing" for name in names}
    devices: list[str] = []
    if not reason:
        torch = importlib.import_module("torch")
        devices = [torch.npu.get_device_name(index) for index in range(torch.npu.device_count())]
    simulated = _simulator().active and not reason
    versions["CANN"] = "missing" if reason else "simulated" if simulated else _cann_version()
    older = None if reason else cann.older_than_needed(versions["torch-npu"])
    return Report(
        active=not reason, reason=reason or "", versions=versions, devices=devices,
        not_installed=multimodal.what_is_missing() or "", simulated=simulated, notes=[older] if older else [],
    )  # fmt: skip


def _simulator() -> Simulator:
    if importlib.util.find_spec("ascend_sim") is None:
        return Simulator()
    decision = importlib.import_module("ascend_sim.loader").decide()
    return Simulator(installed=True, active=decision.active, reason=decision.reason, problem=decision.problem)


def _cann_version() -> str:
    utils = importlib.import_module("torch_npu.npu.utils")
    return str(utils.get_cann_version())
