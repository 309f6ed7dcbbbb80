# SPDX-License-Identifier: Apache-2.0
"""How benchmarks run what they measure: in a process of its own, which prints what it found."""

import json
import os
import subprocess

__all__ = ["result_of"]


def result_of(command, seconds=900, **environment):
    """Run a program that prints a line "RESULT {...}"; that object, or the last line of its complaint as `error`."""
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
