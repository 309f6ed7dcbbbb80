# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ say what is so: each command in them is one that exists, and vLLM with this plugin takes what `vllm serve` is given there."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import vllm_ascend
from typer.testing import CliRunner
from vllm_ascend.cli import app
from zoo import ENTRIES

ROOT = Path(__file__).parents[3]
PAGES = [*sorted((ROOT / "docs" / "guides").glob("*.md")), *(ROOT / "docs" / name for name in ("start.md", "serve.md"))]
DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
MOE = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
BY_PAGE = {"experts.md": MOE, "replicas.md": MOE}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page):
    """Each command of a page's shell blocks as words, without what comes before it in its line."""
    for line in "\n".join(blocks(page, "sh")).splitlines():
        if line:
            yield from map(shlex.split, line.split(" && "))


SERVE = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

refused = []
parser = make_arg_parser(FlexibleArgumentParser())
for folder, words in json.load(open(sys.argv[1])):
    words = [word for word in words if word != "--enforce-eager"]
    try:
        arguments = parser.parse_args(["--model", folder, *words])
        AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except (SystemExit, Exception) as error:
        refused.append([words, str(error)])
json.dump(refused, open(sys.argv[2], "w"))
"""


def test_what_the_pages_serve_is_taken(tmp_path):
    """The placement file is the one that the page's own command plans, from the load that is written here."""
    load = "\n".join(json.dumps({"logical_expert_load": [[4, 3, 2, 1]] * 2}) for _ in range(2))
    (tmp_path / "load.jsonl").write_text(load)
    processor, sizes = ENTRIES["Qwen2VL"].make()
    processor.save_pretrained(tmp_path / "vision")
    import transformers

    transformers.Qwen2VLConfig(**sizes, architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(
        tmp_path / "vision"
    )
    jobs = []
    for page in PAGES:
        if page.name != "vision.md":
            folder = tmp_path / page.stem
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(BY_PAGE.get(page.name, DENSE)))
        for words in commands(page):
            if words[:1] == ["ascend-eplb"]:
                program = "import sys; from ascend_eplb.cli import main; sys.exit(main())"
                subprocess.run([sys.executable, "-c", program, *words[1:]], cwd=tmp_path, check=True)
            if words[:2] == ["vllm", "serve"]:
                jobs.append([str(tmp_path / page.stem), words[3:]])
    assert len(jobs) >= 12
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "serve.py").write_text(SERVE)
    done = subprocess.run(
        [sys.executable, "serve.py", "jobs.json", "refused.json"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "refused.json").read_text()) == []


def exists(words):
    """Whether a command is one that there is; those of other programs are known by their first word."""
    first, *rest = words
    if first in ("vllm", "ascend-eplb"):
        return True  # the test above runs them
    if first == "vllm-ascend":
        return CliRunner().invoke(app, [*rest[: 1 + (rest[0] == "eplb")], "--help"]).exit_code == 0
    if first == "ascend-sim":
        from ascend_sim.cli import app as sim

        return CliRunner().invoke(sim, [rest[0], "--help"]).exit_code == 0
    if first.endswith("nox"):
        return f"def {rest[rest.index('-s') + 1]}(session" in (ROOT / "noxfile.py").read_text()
    if first == "uv":
        return all(has_extra(word) for word in rest if word.startswith("./"))
    return first in ("source", ".", "python3", "pip", ".tools/bin/pip")


def has_extra(requirement):
    """Whether `./packages/name[extra,...]` is a package with these extras."""
    folder, _, extras = requirement.rstrip("]").partition("[")
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    return set(filter(None, extras.split(","))) <= set(project.get("optional-dependencies", ()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist_and_programs_import_what_there_is(page):
    for words in commands(page):
        assert exists(words), words
    for program in blocks(page, "python"):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names)


# Messages that are not this project's: where they come from.
ELSEWHERE = {
    "Failed to infer device type": "vllm/config/device.py",
    "operator torchvision::nms does not exist": None,  # of torch's libraries
    "expandable_segments setting failure": None,  # of torch_npu's
    "torch.OutOfMemoryError": None,
    "maximum context length": "vllm/renderers/params.py",
}


def test_the_messages_that_are_explained_are_messages():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`(?:, or `.*?`)?)[^|]*\|", page, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 15
    ours = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "packages").glob("*/src/**/*.py"))
    site = Path(importlib.util.find_spec("vllm").origin).parents[1]
    for message in messages:
        text = ours
        if message in ELSEWHERE:
            if ELSEWHERE[message] is None:
                continue
            text = (site / ELSEWHERE[message]).read_text(encoding="utf-8")
        for fragment in re.split(r"VLLM_ASCEND_|\.\.\.|\([^)]*\)|\d[\d, ]*|\[", message):
            assert fragment.strip() in text, message


def test_the_versions_are_those_that_are_checked():
    from vllm_ascend.doctor import REQUIRED

    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| ([\w -]+) \| ([\w.]+)", page, re.MULTILINE))
    assert {name: table[{"vllm": "vLLM"}.get(name, name)] for name in REQUIRED} == REQUIRED
    assert table["this plugin"] == vllm_ascend.__version__ if hasattr(vllm_ascend, "__version__") else REQUIRED["vllm"]
