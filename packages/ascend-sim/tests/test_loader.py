# SPDX-License-Identifier: Apache-2.0
"""Starting: what an interpreter pays, when the simulator steps aside, how it compiles, and what it says when it cannot."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ascend_sim import build, cache, loader


def python(code, timeout=1800, **environment):
    """Run code in a fresh interpreter; a variable that is None is unset."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture
def no_variables(monkeypatch):
    for name in ("ASCEND_SIM", "ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cann(tmp_path):
    """Something that looks like an installed CANN."""
    (tmp_path / "cann" / "lib64").mkdir(parents=True)
    (tmp_path / "cann" / "lib64" / "libascendcl.so").write_bytes(b"not really")
    return tmp_path / "cann"


@pytest.fixture
def counting_compiler(tmp_path, monkeypatch):
    """A compiler that notes each call; waits first while the file `wait` exists. Returns (script, log, wait)."""
    script, log, wait = tmp_path / "cxx", tmp_path / "log", tmp_path / "wait"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nwhile [ -e {wait} ]; do sleep 0.05; done\nexec g++ "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "cache"))
    return script, log, wait


# What every interpreter pays


def test_the_start_of_an_interpreter_imports_next_to_nothing():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", ""], capture_output=True, text=True, timeout=1800, check=True
    ).stderr
    lines = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)", shown)
    names = [name for *_, name in lines]
    start, end = names.index("ascend_sim"), names.index("ascend_sim._startup")
    assert names[start : end + 1] == ["ascend_sim", "ascend_sim._startup"]  # os and sys are there already
    print(f"\ninterpreter start: {sum(int(own) for own, *_ in lines[start : end + 1])} us")


def test_neither_torch_nor_the_loader_comes_with_the_interpreter():
    done = python("import sys; print([m for m in sys.modules if 'torch' in m or m.startswith('ascend_sim.')])")
    assert done.stdout.strip() == "['ascend_sim._startup']"


def test_the_package_alone_imports_nothing():
    done = python(
        "import ascend_sim, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(ascend_sim.__version__)"
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)


# The decision


@pytest.mark.usefixtures("no_variables")
def test_active_where_there_is_no_cann():
    assert loader.decide().active
    assert loader.decide().reason == "there is no CANN on this host"


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize(
    ("variable", "folder"), [("ASCEND_TOOLKIT_HOME", ""), ("ASCEND_HOME_PATH", ""), ("LD_LIBRARY_PATH", "lib64")]
)
def test_a_real_cann_is_left_alone(monkeypatch, cann, variable, folder):
    monkeypatch.setenv(variable, str(cann / folder))
    decision = loader.decide()
    assert not decision.active
    assert str(cann / "lib64") in decision.reason
    assert loader.watched_spec("torch_npu") is None
    monkeypatch.setenv("ASCEND_SIM", "1")
    assert loader.decide().active


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize("variable", ["ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"])
def test_a_folder_that_cannot_be_looked_into_is_no_cann(monkeypatch, variable):
    monkeypatch.setenv(variable, "x" * 5000)  # an error of the system, as is a folder without permission
    assert loader.decide().active


@pytest.mark.usefixtures("no_variables")
def test_inactive_without_torch_npu(monkeypatch):
    monkeypatch.setattr(loader.PathFinder, "find_spec", lambda name: None)
    assert not loader.decide().active
    assert "pip install torch-npu" in loader.decide().reason


@pytest.mark.parametrize("how", ["off", "cann"])
def test_stepping_aside_leaves_torch_npu_to_itself(cann, how):
    environment = {"ASCEND_SIM": "0"} if how == "off" else {"ASCEND_SIM": None, "ASCEND_TOOLKIT_HOME": str(cann)}
    done = python("import torch", **environment)
    assert done.returncode == 1
    assert "Failed to load the backend extension: torch_npu" in done.stderr
    assert re.search(r"lib\w+\.so: cannot open shared object file", done.stderr)
    assert "ascend_sim" not in done.stderr.replace(sys.prefix, "")


def test_torch_alone_works_with_the_simulator_off():
    code = "import sys, torch; print(torch.ones(2).sum().item(), 'torch_npu' in sys.modules, 'ascend_sim.loader' in sys.modules)"
    done = python(code, ASCEND_SIM="0", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout == "2.0 False False\n", done.stderr


def test_torch_npu_may_come_first_and_devices_memory_and_chip_follow_the_variables():
    code = (
        "import torch_npu, torch, importlib, torch_npu.npu.utils, torch_npu.distributed\n"
        "from ascend_sim import activate, loader\n"
        "activate.activate(); loader.before_torch()\n"  # again: no harm
        "assert type(torch_npu.__spec__.loader).__name__ == '_Watched' and torch_npu.__file__ == torch_npu.__spec__.origin\n"
        "assert importlib.util.find_spec('torch_npu.npu') is not None\n"
        "import inspect; assert 'torch' in inspect.getsource(torch_npu)\n"
        "print((torch.ones(2, device='npu') + 1).tolist(), torch.npu.device_count(), torch.npu.mem_get_info()[1])\n"
        "print(torch.npu.get_device_name(0))"
    )
    changed = {"ASCEND_SIM_DEVICES": "3", "ASCEND_SIM_MEMORY": "512 MiB", "ASCEND_SIM_SOC": "Ascend910_9391"}
    done = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **changed)
    assert done.stdout == f"[2.0, 2.0] 3 {512 << 20}\nAscend910_9391\n", done.stderr


# Mistakes in variables


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ASCEND_SIM", "yes", "ASCEND_SIM is 'yes'; allowed: 0 (off), 1 (on)"),
        ("ASCEND_SIM_DEVICES", "0", "ASCEND_SIM_DEVICES is '0'; allowed: 1 to 64"),
        ("ASCEND_SIM_DEVICES", "65", "allowed: 1 to 64"),
        ("ASCEND_SIM_DEVICES", "two", "allowed: 1 to 64"),
        ("ASCEND_SIM_SOC", "Ascend1", "ASCEND_SIM_SOC is 'Ascend1'; allowed: Ascend910B3, Ascend910_9391"),
        ("ASCEND_SIM_MEMORY", "much", "ASCEND_SIM_MEMORY is 'much'; allowed: a number with one of KiB, MiB, GiB"),
        ("ASCEND_SIM_MEMORY", "1KiB", "allowed: at least 32MiB"),
        ("ASCEND_SIM_STRICT", "no", "ASCEND_SIM_STRICT is 'no'; allowed: 1 (as hardware), 0 (relaxed)"),
    ],
)
def test_a_bad_variable_is_named_and_torch_stays_importable(variable, value, message):
    code = (
        "import torch\nprint(torch.ones(1).item())\n"
        "for use in (lambda: torch.npu.device_count(), lambda: __import__('torch_npu')):\n"
        "    try: use()\n    except (ImportError, RuntimeError) as error: print(type(error).__name__, error)"
    )
    done = python(code, **{variable: value})
    assert done.returncode == 0, done.stderr
    computed, *said = done.stdout.splitlines()
    assert computed == "1.0"
    assert [line.partition(" ")[0] for line in said] == ["RuntimeError", "ImportError"]
    for line in (*said, done.stderr.strip()):
        assert f"ascend-sim: there is no simulated NPU in this process: {variable} is " in line
        assert message in line


@pytest.mark.parametrize("given", [None, "1"])
def test_torch_without_the_simulator_leaves_the_environment_as_it_was(given):
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    done = python(f"import os, torch; print(os.environ.get({name!r}))", ASCEND_SIM_SOC="none", **{name: given})
    assert done.stdout == f"{given}\n", done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("1.5 gib", 3 << 29), ("512 MiB", 512 << 20), ("100000000", 10**8), ("1GB", 10**9)],
)
def test_sizes(text, size):
    assert loader.memory_bytes(text) == size


@pytest.mark.parametrize("text", ["9" * 400, "1" + "0" * 30 + "GiB", "65537GiB"])
def test_sizes_that_no_process_can_address(text):
    assert loader.memory_bytes("65536GiB") == 1 << 46
    with pytest.raises(ValueError, match=r"ASCEND_SIM_MEMORY is '[0-9]+(GiB)?'; allowed: at most 65536GiB"):
        loader.memory_bytes(text)


# Compiling


NO_METADATA = """
from importlib.metadata import PackageNotFoundError
from ascend_sim import build
def version(package):
    raise PackageNotFoundError(package)
build.version = version
"""


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (NO_METADATA, "ascend-sim needs the version of torch, whose metadata are not installed: pip install "),
        ("import sys; sys.stderr.close()", "the compiler failed"),
        ("import sys; sys.stderr = None", "the compiler failed"),
        ("", "the compiler failed"),
    ],
)
def test_torch_stays_importable_whatever_goes_wrong(tmp_path, before, message):
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\nprintf '\\377 is not UTF-8'\nexit 1\n")
    script.chmod(0o755)
    code = (
        f"{before}\nimport torch\nprint(torch.ones(1).item())\n"
        "try: torch.npu.current_device()\nexcept RuntimeError as error: print(error)"
    )
    done = python(code, CXX=str(script), ASCEND_SIM_CACHE=str(tmp_path / "cache"), TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1.0\nascend-sim: there is no simulated NPU in this process: ")
    assert message in done.stdout


@pytest.mark.parametrize("closed", ["sys.stdout.close()", "sys.stdout = None"])
def test_torch_npu_needs_no_standard_output(closed):
    done = python(f"import sys; {closed}; import torch; sys.stderr.write(str(torch.ones(1, device='npu').item()))")
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("1.0")  # after a warning of torch_npu's


def test_what_is_loaded_is_checked_once():
    code = (
        "from ascend_sim import cache\nchecked, is_whole = [], cache.is_whole\n"
        "cache.is_whole = lambda final: (checked.append(final.name.partition('-')[0]), is_whole(final))[1]\n"
        "import torch\ntorch.ones(1, device='npu')\nprint(checked)"
    )
    assert python(code).stdout == "['runtime', 'native']\n"


@pytest.mark.parametrize("part", ["sources", "options", "compiler", "link"])
def test_an_entry_is_that_of_its_sources_options_and_compiler(tmp_path, monkeypatch, part):
    source, compiler, other = tmp_path / "a.cpp", tmp_path / "cxx", tmp_path / "other"
    for script in (compiler, other):
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
    (tmp_path / "c++").symlink_to(compiler)
    source.write_text("int a;")
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "cache"))
    options = ["-O2"]
    name = build.name_of("thing", [source], options)
    assert build.name_of("thing", [source], options) == name
    if part == "sources":
        source.write_text("int b;")
    elif part == "options":
        options = ["-O3"]
    elif part == "compiler":
        monkeypatch.setenv("CXX", str(other))
    else:  # another version under the same name
        (tmp_path / "c++").unlink()
        (tmp_path / "c++").symlink_to(other)
    assert build.name_of("thing", [source], options) != name


def test_without_a_compiler_what_another_one_made_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "cache"))
    names = []
    for number in range(3):
        script = tmp_path / f"cxx{number}"
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        names.append(build.name_of("thing", [], []))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX")
    nothing = build.name_of("thing", [], [])
    assert nothing not in names
    assert nothing[:-8] == names[0][:-8]
    for name in names[:2]:
        with cache.entry(name) as (_, made):
            (made / "lib.so").write_bytes(b"compiled")
    assert build.name_of("thing", [], []) == min(names[:2])
    (tmp_path / "cache" / min(names[:2]) / "lib.so").unlink()
    assert build.name_of("thing", [], []) == max(names[:2])


def test_without_a_compiler_torch_stays_importable_and_the_package_is_named(tmp_path):
    done = python("import torch; torch.npu.current_device()", PATH="/nowhere", CXX=None, ASCEND_SIM_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert (
        "RuntimeError: ascend-sim: there is no simulated NPU in this process: ascend-sim compiles its kernels once and found"
        in done.stderr
    )
    assert "apt install g++" in done.stderr
    assert not [entry for entry in tmp_path.iterdir() if entry.suffix != ".lock"]


def test_several_processes_compile_once_and_then_need_no_compiler(counting_compiler):
    _, log, _ = counting_compiler
    code = "from ascend_sim import build, loader; print(build.runtime(loader.SONAMES))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = {process.communicate(timeout=1800)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(folders) == 1
    assert len(log.read_text().splitlines()) == 1 + len(loader.SONAMES)
    done = python("from ascend_sim import loader; loader.before_torch()", PATH="/nowhere", CXX=None)
    assert done.returncode == 0, done.stderr


def test_a_killed_compile_leaves_nothing_half_made_and_no_compiler(counting_compiler, tmp_path):
    script, log, wait = counting_compiler
    wait.touch()
    code = "from ascend_sim import build, loader; build.runtime(loader.SONAMES)"
    first = subprocess.Popen([sys.executable, "-c", code])
    while not log.exists() and first.poll() is None:
        time.sleep(0.05)
    assert log.exists()
    first.kill()
    first.wait(timeout=1800)

    def running():
        commands = (entry / "cmdline" for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [command for command in commands if command.exists() and str(script).encode() in _bytes_of(command)]

    while running():  # the limit is that of the session
        time.sleep(0.05)
    cache_folder = tmp_path / "cache"
    assert not list(cache_folder.glob("runtime-*[0-9a-f]/"))
    wait.unlink()
    assert (build.runtime(loader.SONAMES) / "libascendcl.so").exists()
    assert sorted(entry.suffix for entry in cache_folder.iterdir()) == ["", ".lock"]  # and no scratch of the killed one


def _bytes_of(file):
    try:
        return file.read_bytes()
    except OSError:  # the process has ended
        return b""


def test_a_failing_compiler_is_quoted_and_not_cached(tmp_path, monkeypatch):
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho the disk is full >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="the disk is full"):
        build.runtime(loader.SONAMES)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_header_concerns_the_sources_that_include_it(tmp_path):
    (tmp_path / "a.h").write_text("")
    (tmp_path / "b.h").write_text('  #  include "a.h"\n')
    (tmp_path / "uses_b.cpp").write_text('#include <vector>\n#include "b.h"\n')
    (tmp_path / "uses_none.cpp").write_text('// #include "b.h" in a comment\n#include <vector>\n')
    assert build.headers_of(tmp_path / "uses_b.cpp") == [tmp_path / "a.h", tmp_path / "b.h"]
    assert build.headers_of(tmp_path / "uses_none.cpp") == []
    _, headers = build.native_sources()
    assert set((build.HERE / "native").glob("*.h")) <= set(headers), "no source includes it"
    assert build.RUNTIME / "runtime.h" not in headers, "it concerns the runtime alone"
    assert any(set(build.headers_of(source)) != set(headers) for source in build.native_sources()[0])
