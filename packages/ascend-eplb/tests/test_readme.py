# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import re
from importlib.metadata import metadata

import pytest


def test_the_python_example_prints_what_it_says():
    readme = metadata("ascend-eplb").get_payload() or metadata("ascend-eplb")["Description"]
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
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
