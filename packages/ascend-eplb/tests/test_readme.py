# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_eplb.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_prints_what_it_says():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    promised = re.findall(r"^# (.*)$", code, re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    found, expected = (
        [[float(number) for number in re.findall(r"[\d.]+\d|\d+", line)] for line in lines]
        for lines in (printed.getvalue().splitlines(), promised)
    )
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=0.02, abs=1)
        assert mine[:2] == pytest.approx(theirs[:2], abs=0.003)


def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == 11
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
        else:
            assert program == "ascend-eplb"
            assert main(arguments) == 0, command
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "expert_map: 256 entries, 17 here, 239 are -1" in printed
    promised = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    assert len(promised) == 1
    assert all(line in printed.splitlines() for line in promised)
