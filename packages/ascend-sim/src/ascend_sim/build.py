# SPDX-License-Identifier: Apache-2.0
"""Compiles the simulator's C and C++ once per (sources, options, torch, torch_npu, processor, compiler) and keeps the result in a cache folder.

A cache that is filled needs no compiler: it may be made where there is one and used where there is none. What any compiler made is used there.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ascend_sim import cache
from ascend_sim.messages import say

__all__ = ["compiled", "compiler", "native", "runtime"]

HERE = Path(__file__).parent
RUNTIME = HERE / "runtime"
RUNTIME_OPTIONS = ("-shared", "-fPIC", "-O2")
OBJECT_OPTIONS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-fopenmp")
LIBRARY_OPTIONS = ("-shared", "-ltorch_cpu", "-lc10", "-ltorch_npu", "-fopenmp")


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
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        return "".join(sorted({line for line in info if line.startswith(("flags", "Features", "model name"))}))


def installed(package: str) -> str:
    """Version of a package by its metadata; RuntimeError with the remedy where it has none."""
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise RuntimeError(
            f"ascend-sim needs the version of {package}, whose metadata are not installed: pip install --force-reinstall {package}"
        ) from error


def digest(sources: Sequence[Path], options: Sequence[str]) -> str:
    """What a cache entry is made of, but for the compiler: these sources and options, on this host."""
    state = hashlib.sha256()
    form = "manifest"  # how entries are kept
    for part in (form, installed("torch"), installed("torch-npu"), processor(), *options):
        state.update(part.encode() + b"\0")
    for source in sources:
        state.update(source.read_bytes() + b"\0")
    return state.hexdigest()[:16]


def name_of(kind: str, sources: Sequence[Path], options: Sequence[str]) -> str:
    """Name of a cache entry. It ends with the compiler; where there is none, that of an entry which another one made is returned, if there is any."""
    name = f"{kind}-{digest(sources, options)}"
    try:
        found = compiler()
    except RuntimeError:
        made = sorted(cache.root().glob(f"{name}-{'?' * 8}"))
        if len(made) > 1:
            made = [entry for entry in made if cache.is_whole(entry)] or made
        return made[0].name if made else f"{name}-{'0' * 8}"
    # The real path of g++ has the number of its version; all commands of ccache have the same real path.
    return f"{name}-{hashlib.sha256(os.fsencode(found) + os.fsencode(os.path.realpath(found))).hexdigest()[:8]}"


# Runs the compiler in a process group of its own, which ends when standard input does: at the latest when this process is gone, killed or not.
WATCHED = """exec 3<&0
(read -r _ <&3; kill -s KILL -- "-$$") >/dev/null 2>&1 &
exec 3<&-
"$@" </dev/null"""


def run(command: Sequence[str]) -> None:
    """Run the compiler; RuntimeError with its last words if it fails. It does not outlive this process."""
    watched, lives = os.pipe()
    try:
        with subprocess.Popen(
            ["/bin/sh", "-c", WATCHED, "sh", *command],
            stdin=watched,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            said, _ = process.communicate()
    finally:
        os.close(watched)
        os.close(lives)
    if process.returncode:
        raise RuntimeError(f"ascend-sim: the compiler failed ({' '.join(command[:3])} ...):\n{said[-4000:]}")


def acl_headers() -> Path:
    """The headers of CANN that the torch_npu wheel carries."""
    return package_folder("torch_npu") / "include" / "third_party" / "acl" / "inc"


def runtime_sources() -> list[Path]:
    """The C sources and headers of the stub of CANN."""
    return sorted(path for path in RUNTIME.iterdir() if path.suffix in (".c", ".h"))


def runtime(sonames: Sequence[str]) -> Path:
    """Folder that holds the stub of CANN (`libascendcl.so`) and one empty library for each of `sonames`, which depends on it."""
    with cache.entry(_runtime_name(sonames)) as (final, made):
        if made:
            shared = [compiler(), *RUNTIME_OPTIONS]
            stub = made / "libascendcl.so"
            sources = [str(source) for source in runtime_sources() if source.suffix == ".c"]
            # g++ takes -x for the next file alone.
            in_c = [option for source in sources for option in ("-x", "c", source)]
            run([*shared, f"-I{acl_headers()}", "-Wl,-soname,libascendcl.so", "-o", str(stub), *in_c,
                 "-x", "none", "-lpthread"])  # fmt: skip
            for name in sonames:
                run([*shared, "-x", "c", "/dev/null", "-x", "none", "-Wl,--no-as-needed", f"-Wl,-soname,{name}.so", "-Wl,-rpath,$ORIGIN",
                     "-o", str(made / f"{name}.so"), str(stub)])  # fmt: skip
    return final


def _runtime_name(sonames: Sequence[str]) -> str:
    return name_of("runtime", runtime_sources(), [*RUNTIME_OPTIONS, *sonames])


def headers_of(source: Path) -> list[Path]:
    """The headers of this package that a source includes, directly or by another one."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', waiting.pop().read_text(encoding="utf-8"), re.MULTILINE):
            header = next((folder / name for folder in (source.parent, RUNTIME) if (folder / name).exists()), None)
            if header and header not in found:
                found[header] = None
                waiting.append(header)
    return sorted(found)


def object_file(source: Path) -> Path:
    """The object file of one C++ source, compiled against the installed torch."""
    with cache.entry(name_of(f"object-{source.stem}", [source, *headers_of(source)], OBJECT_OPTIONS)) as (final, made):
        if made:
            torch, npu = package_folder("torch") / "include", package_folder("torch_npu") / "include"
            include = [f"-I{path}" for path in (torch, torch / "torch/csrc/api/include", npu, acl_headers(), RUNTIME)]
            run([compiler(), *OBJECT_OPTIONS, *include, "-c", str(source), "-o", str(made / "native.o")])
    return final / "native.o"


def native_sources() -> tuple[list[Path], list[Path]]:
    """The C++ sources of the operators, and the headers that they include."""
    sources = sorted((HERE / "native").glob("*.cpp"))
    return sources, sorted({header for source in sources for header in headers_of(source)})


def _native_name() -> str:
    sources, headers = native_sources()
    return name_of("native", [*sources, *headers], [*OBJECT_OPTIONS, *LIBRARY_OPTIONS])


def compiled(sonames: Sequence[str]) -> bool:
    """Whether all is compiled and whole, so that the next process starts at once. RuntimeError where the cache folder cannot be used.

    Args:
        sonames: as for `runtime`.
    """
    folder = cache.root()
    return all(cache.is_whole(folder / name) for name in (_native_name(), _runtime_name(sonames)))


@functools.cache  # before torch is imported it is compiled and checked, and afterwards loaded
def native() -> Path:
    """The library of operators: every `native/*.cpp`, as many at a time as there are processors."""
    with cache.entry(_native_name()) as (final, made):
        if made:
            say("ascend-sim: compiling the simulator's kernels, once (a minute or two) ...")
            sources, _ = native_sources()
            libraries = [package_folder(name) / "lib" for name in ("torch", "torch_npu")]
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                objects = list(pool.map(object_file, sources))
            found = [option for folder in libraries for option in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
            run([compiler(), "-o", str(made / "libascend_sim.so"), *map(str, objects), *found, *LIBRARY_OPTIONS])
    return final / "libascend_sim.so"
