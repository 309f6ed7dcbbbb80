# SPDX-License-Identifier: Apache-2.0
"""Compiles the simulator's C and C++ once per (sources, torch, torch_npu, processor) and keeps the result in a cache folder.

A cache that is filled needs no compiler: it may be made where there is one and used where there is none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path

__all__ = ["cache_folder", "compiled", "compiler", "native", "runtime"]

HERE = Path(__file__).parent
RUNTIME = HERE / "runtime" / "cann.c"


def cache_folder() -> Path:
    """Where compiled libraries are kept: ASCEND_SIM_CACHE, or `ascend-sim` in the user's cache folder."""
    if folder := os.environ.get("ASCEND_SIM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend-sim"


def compiler() -> str:
    """Path of the C++ compiler; RuntimeError with the remedy where there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise RuntimeError("ascend-sim compiles its kernels once and found no C++ compiler: apt install g++ (or set CXX)")


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = PathFinder.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"ascend-sim needs the package {name}, which is not installed")
    return Path(spec.origin).parent


def processor() -> str:
    """What -march=native depends on, so that a cache folder shared by several hosts stays right."""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        return "".join(sorted({line for line in info if line.startswith(("flags", "Features", "model name"))}))


def digest(sources: Sequence[Path]) -> str:
    """Name of the cache entry of these sources on this host."""
    state = hashlib.sha256()
    for part in (version("torch"), version("torch_npu"), processor()):
        state.update(part.encode() + b"\0")
    for source in sources:
        state.update(source.read_bytes() + b"\0")
    return state.hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; several processes may start at once and one compiles. The lock goes with a killed process."""
    with open(path, "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def location(kind: str, sources: Sequence[Path]) -> Path:
    """Folder of a cache entry."""
    return cache_folder() / f"{kind}-{digest(sources)}"


@contextlib.contextmanager
def entry(kind: str, sources: Sequence[Path]) -> Iterator[tuple[Path, Path | None]]:
    """Yield (final folder, folder to fill, or None if it is there already); the filled one is renamed into place at the end."""
    final = location(kind, sources)
    root = final.parent
    root.mkdir(parents=True, exist_ok=True)
    if final.exists():
        yield final, None
        return
    with locked(root / f"{final.name}.lock"):
        if final.exists():
            yield final, None
            return
        for left_behind in root.glob(f".{final.name}-*"):  # by a compile that was killed
            shutil.rmtree(left_behind)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{final.name}-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            yield final, made
            made.rename(final)


def run(command: Sequence[str]) -> None:
    """Run the compiler; RuntimeError with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ascend-sim: the compiler failed ({' '.join(command[:3])} ...):\n{done.stderr[-4000:]}")


def runtime(sonames: Sequence[str]) -> Path:
    """Folder that holds the stub of CANN (`libascendcl.so`) and one empty library for each of `sonames`, which depends on it."""
    with entry("runtime", [RUNTIME]) as (final, made):
        if made:
            headers = package_folder("torch_npu") / "include" / "third_party" / "acl" / "inc"
            shared = [compiler(), "-shared", "-fPIC", "-O2"]
            stub = made / "libascendcl.so"
            run(
                [
                    *shared,
                    "-x",
                    "c",
                    f"-I{headers}",
                    "-Wl,-soname,libascendcl.so",
                    "-o",
                    str(stub),
                    str(RUNTIME),
                    "-lpthread",
                ]
            )
            for name in sonames:
                run([*shared, "-x", "c", "/dev/null", "-x", "none", "-Wl,--no-as-needed", f"-Wl,-soname,{name}.so", "-Wl,-rpath,$ORIGIN",
                     "-o", str(made / f"{name}.so"), str(stub)])  # fmt: skip
    return final


def object_file(source: Path, headers: Sequence[Path]) -> Path:
    """The object file of one C++ source, compiled against the installed torch."""
    with entry(f"object-{source.stem}", [source, *headers]) as (final, made):
        if made:
            torch = package_folder("torch")
            include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
            flags = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-fopenmp"]
            run([compiler(), *flags, *include, "-c", str(source), "-o", str(made / "native.o")])
    return final / "native.o"


def native_sources() -> tuple[list[Path], list[Path]]:
    """The C++ sources and headers of the operators."""
    folder = HERE / "native"
    return sorted(folder.glob("*.cpp")), sorted(folder.glob("*.h"))


def compiled() -> bool:
    """Whether all is compiled, so that the next process starts at once."""
    sources, headers = native_sources()
    return location("native", [*sources, *headers]).exists() and location("runtime", [RUNTIME]).exists()


def native() -> Path:
    """The library of operators: every `native/*.cpp`, as many at a time as there are processors."""
    sources, headers = native_sources()
    with entry("native", [*sources, *headers]) as (final, made):
        if made:
            print(
                "ascend-sim: compiling the simulator's kernels, once (a minute or two) ...", file=sys.stderr, flush=True
            )
            torch = package_folder("torch")
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                objects = list(pool.map(object_file, sources, [headers] * len(sources)))
            run([compiler(), "-shared", "-o", str(made / "libascend_sim.so"), *map(str, objects), f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib",
                 "-ltorch_cpu", "-lc10", "-fopenmp"])  # fmt: skip
    return final / "libascend_sim.so"
