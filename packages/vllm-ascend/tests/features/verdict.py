# SPDX-License-Identifier: Apache-2.0
"""What the runs of a cell are worth: [word, detail]."""

import re

import torch
from zoo.verdict import raised_in

GOOD = ("works", "refused", "eager", "not run")


def of_refusal(said, folder):
    """The cell of a configuration that is refused."""
    return ["refused", " ".join(said.replace(str(folder), "MODEL").split())]


def of_crash(said):
    """The cell of runs that ended badly, from what they printed."""
    raised = raised_in(said) or ["it said nothing"]
    return ["crash", next((line for line in raised if "EngineDead" not in line and "root cause" not in line), raised[-1])]  # fmt: skip


def of_runs(names, results, expected, printed):
    """The cell of runs that ended well.

    Args:
        names: the features.
        results: what each replica wrote.
        expected: of each replica what each of its prompts must be answered, `{"tokens": ...}` or `{"vectors": ..., "bound": ...}`.
        printed: what all of them printed.
    """
    for result, wanted in zip(results, expected, strict=True):
        for number, each in enumerate(result["rounds"]):
            if each["refused"]:
                return ["crash", f"before run {number}: {each['refused'][0]}"]
            if wrong := difference(each["said"], wanted):
                return ["wrong", f"run {number}: {wrong}"]
    if missing := next(absent(names, results), None):
        return ["wrong", missing]
    if "graphs" in names and results[0]["replays"] == 0:
        line = reason_of_no_graphs(printed)
        return ["eager", line] if line else ["wrong", "no step was a replay of a graph, and nothing says why"]
    return ["works", ""]


def difference(found, wanted):
    """What differs from the reference, or ""."""
    if "tokens" in wanted:
        both = enumerate(zip(found, wanted["tokens"], strict=True))
        # Rounding may leave fewer tokens decided than were said.
        wrong = [n for n, (said, right) in both if said[: len(right)] != right]
        return f"answers {wrong} of {len(found)} differ: {found[wrong[0]]} for {wanted['tokens'][wrong[0]]}" if wrong else ""  # fmt: skip
    errors = (torch.tensor(found, dtype=torch.float64) - torch.tensor(wanted["vectors"], dtype=torch.float64)).norm(dim=1)  # fmt: skip
    return f"vectors err by {errors.max():.2g}, more than {wanted['bound']:.2g}" if errors.max() > wanted["bound"] else ""  # fmt: skip


def absent(names, results):
    """What the features of a cell should have shown and have not."""
    first = results[0]
    if "speculation" in names and not all(result["accepted"] for result in results):
        yield "no drafted token was kept"
    if {"prefix cache", "KV transfer"}.intersection(names) and not any(r["rounds"][1]["cached"] for r in results):
        yield "no token of the prompts came from a cache"
    if "KV offload" in names and not any(result["from_host"] for result in results):
        yield "no token of the prompts came from host memory"
    if "EPLB" in names and not (first["moved"] and first["moved"]["moves"] and not first["moved"]["failures"]):
        yield f"experts have not moved: {first['moved']}"


def reason_of_no_graphs(printed):
    """The line that says why steps run operator by operator."""
    line = next((line for line in printed.splitlines() if "are not captured in graphs by vllm-ascend" in line), "")
    return re.sub(r"^.*?\] ", "", re.sub(r"^\(.*?\) ", "", line)).strip()


def is_good(cell):
    return cell[0] in GOOD
