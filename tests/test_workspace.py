# SPDX-License-Identifier: Apache-2.0
"""What all packages have in common: names, words, versions, licences, the contents of wheels. Read from the sources, so that nothing needs to be installed."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
PAGES = [*sorted(ROOT.glob("packages/*/README.md")), *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
PINNED = ("torch", "torch-npu", "vllm")


def project(package: Path) -> dict:
    return tomllib.loads((package / "pyproject.toml").read_text())["project"]


def requirements(package: Path) -> list[str]:
    found = project(package)
    return [
        *found.get("dependencies", []),
        *(one for extra in found.get("optional-dependencies", {}).values() for one in extra),
    ]


def version(package: Path) -> str:
    """The package's version, from its pyproject.toml or, where that says so, from `__version__`."""
    if "version" in project(package):
        return project(package)["version"]
    where = tomllib.loads((package / "pyproject.toml").read_text())["tool"]["hatch"]["version"]["path"]
    (found,) = re.findall(r'^__version__ = "(.+)"$', (package / where).read_text(), re.MULTILINE)
    return found


def docstrings(path: Path) -> list[tuple[int, str]]:
    """The line and the text of every docstring of a file."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            found.append((getattr(node, "lineno", 1), text))
    return found


def test_no_two_public_classes_have_one_name():
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_docstrings_say_something():
    """A reader of one docstring has not read the one before it."""
    empty = re.compile(r"^(as|like) above\b|^note (it|them|this|the|which|what)\b|^see above\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in SOURCES
        for line, text in docstrings(path)
        if empty.search(text)
    ]
    assert found == []


def test_each_version_has_its_heading_in_the_changelog():
    for package in PACKAGES:
        assert f"## {version(package)}\n" in (package / "CHANGELOG.md").read_text(), package.name


def test_a_version_is_written_once():
    for package in PACKAGES:
        (module,) = (package / "src").glob("*/__init__.py")
        assert ("version" in project(package)) is not bool(
            re.search("^__version__", module.read_text(), re.MULTILINE)
        ), package.name


def test_pinned_versions_agree():
    """Of torch, torch_npu and vLLM: dependencies, what `vllm-ascend doctor` requires, hints of error messages, and pages."""
    plugin = requirements(ROOT / "packages" / "vllm-ascend")
    pinned = {name: one.removeprefix(f"{name}==") for name in PINNED for one in plugin if one.startswith(f"{name}==")}
    assert sorted(pinned) == sorted(PINNED)
    wrong = []
    for path in [*SOURCES, *PAGES, *(package / "pyproject.toml" for package in PACKAGES), ROOT / "noxfile.py"]:
        for name, said in re.findall(r"\b(torch-npu|torch|vllm)==([\d.]+\d)", path.read_text()):
            wrong += [f"{path.relative_to(ROOT)}: {name}=={said}"] * (said != pinned[name])
    assert wrong == []
    tree = ast.parse((ROOT / "packages/vllm-ascend/src/vllm_ascend/doctor.py").read_text())
    (required,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [target.id for target in node.targets if isinstance(target, ast.Name)] == ["REQUIRED"]
    )
    assert required == pinned
    next_minor = re.sub(r"\.(\d+)\..*", lambda found: f".{int(found[1]) + 1}", pinned["torch"])
    minor = pinned["torch"].rpartition(".")[0]
    for package in PACKAGES:
        for one in requirements(package):
            if re.match(r"torch\b(?!-)", one):
                assert one in (f"torch=={pinned['torch']}", f"torch>={minor},<{next_minor}"), (package.name, one)
    assert version(ROOT / "packages" / "vllm-ascend") == pinned["vllm"], (
        "the plugin has the version of the vLLM that it is for"
    )


def test_packages_of_the_workspace_require_each_other_as_they_are():
    for package in PACKAGES:
        for one in requirements(package):
            name, _, wanted = re.sub(r"\[.*\]", "", one).partition(">=")
            if (ROOT / "packages" / name).is_dir() and name != package.name:
                major, minor, _ = version(ROOT / "packages" / name).split(".")
                assert wanted == f"{major}.{minor},<{major}.{int(minor) + 1}", (package.name, one)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """Each package's wheel, by the package's name."""
    pytest.importorskip("hatchling", reason="nox -s lint installs it")
    folder = tmp_path_factory.mktemp("wheels")
    for package in PACKAGES:
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False, timeout=1800)
        assert done.returncode == 0, done.stderr
    return {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheels_have_the_licence_and_nothing_of_the_tests(wheels):
    assert sorted(wheels) == [package.name for package in PACKAGES]
    licence = (ROOT / "LICENSE").read_bytes()
    for package in PACKAGES:
        with zipfile.ZipFile(wheels[package.name]) as wheel:
            about, names = metadata(wheel), wheel.namelist()
            assert (about["License-Expression"], about.get_all("License-File")) == ("Apache-2.0", ["LICENSE"]), (
                package.name
            )
            (where,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
            assert wheel.read(where) == licence, package.name
            assert about["Version"] == version(package)
            module = package.name.replace("-", "_")
            assert f"{module}/py.typed" in names
            strangers = [name for name in names if not name.startswith((f"{module}/", f"{module}-"))]
            assert strangers == (["ascend_sim.pth"] if package.name == "ascend-sim" else [])
            assert not any("test" in Path(name).name for name in names), package.name


def test_each_promised_python_has_a_session():
    """`requires-python` names the versions that nox tests, and no others."""
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    constants = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.List)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("PYTHON", "OTHER_PYTHONS", "ON_OTHER_PYTHONS")
    }
    for package in PACKAGES:
        minors = [int(constants["PYTHON"].split(".")[1])]
        if package.name in constants["ON_OTHER_PYTHONS"]:
            minors += [int(other.split(".")[1]) for other in constants["OTHER_PYTHONS"]]
        assert project(package)["requires-python"] == f">=3.{min(minors)},<3.{max(minors) + 1}", package.name


def called(node: ast.Call) -> str:
    """The dotted name of what is called."""
    return ast.unparse(node.func)


def test_no_source_takes_code_out_of_data():
    """What SECURITY.md promises of pickles, YAML, evaluated text and shells."""
    forbidden = {
        "eval",
        "exec",
        "os.system",
        "os.popen",
        "torch.load",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    }
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                wrong += [
                    f"{place}: import of {name}"
                    for name in names
                    if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")
                ]
            if not isinstance(node, ast.Call):
                continue
            options = {option.arg: option.value for option in node.keywords}
            if called(node) in forbidden or called(node).endswith(".load_pickle"):
                wrong.append(f"{place}: {called(node)}")
            if (
                called(node) in ("np.load", "numpy.load")
                and ast.unparse(options.get("allow_pickle", ast.Constant(None))) != "False"
            ):
                wrong.append(f"{place}: {called(node)} without allow_pickle=False")
            wrong += [f"{place}: {name}" for name in ("shell", "trust_remote_code") if name in options]
    assert wrong == []
