# SPDX-License-Identifier: Apache-2.0
"""The README's examples do what it says, and its table names the kernels that there are."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vllm_ascend import kernels
from vllm_ascend.attention import kernels as attention
from vllm_ascend.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_prints_what_it_says(smollm2, tmp_path):
    """In bfloat16, so the question is one whose answer leads by 1.0 at each token: processors sum in other orders, and where two tokens are near
    (0.08 for "What is the capital of France?"), some answer otherwise."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    (tmp_path / "smollm2").symlink_to(smollm2)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=1800,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert expected in done.stdout


@pytest.mark.slow
def test_the_quantised_example_works(smollm2, tmp_path, monkeypatch):
    (code,) = re.findall(r"```\n(from pathlib.*?)```", README, re.DOTALL)
    (tmp_path / "smollm2").symlink_to(smollm2)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "smollm2-w8a8" / "quant_model_description.json").is_file()


def test_a_new_op_is_explained(tmp_path):
    """The end of docs/add-an-op.md: its program imports the op of the page's first one."""
    page = (Path(__file__).parents[3] / "docs" / "add-an-op.md").read_text(encoding="utf-8")
    example, program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == re.findall(r"```text\n(.*?)```", page, re.DOTALL)[1]


def test_the_table_of_kernels_is_complete():
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (kernels, attention))
    assert set(re.findall(r"`(npu_\w+)`", README)) == set(re.findall(r"\bnpu\(\)\.(npu_\w+)", source))


def test_the_explained_example_works(tmp_path, monkeypatch):
    (line,) = re.findall(r"^vllm-ascend (explain .*)$", README, re.MULTILINE)
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
              "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, shlex.split(line))
    assert done.exit_code == 0, done.output
    assert "SequenceRowParallelOp" in done.stdout
