# SPDX-License-Identifier: Apache-2.0
"""What the runs of models that embed, classify and give rewards are worth, and their section of docs/models.md."""

import json
from pathlib import Path

from pooling_errors import float32_bound, in_bfloat16, in_blocks, relative_errors
from pooling_models import CASES, answers, build, texts
from rounding import excess

from zoo.verdict import BLOCK_TOKENS

RESULTS = Path(__file__).parents[4] / "docs" / "pooling.json"
HEADINGS = {"float32": "float32", "cache": "prefix cache", "chunked": "chunks", "tp": "TP 2", "bfloat16": "strict bfloat16"}  # fmt: skip
CAUSAL = ("qwen3-embedding", "gte-qwen2", "qwen3-classifier")
"""Whose answer is that of the last token, so that vLLM caches and cuts their prompts."""
SHORT, LONG = texts((1, 2, 7, 16, 33, 64, 129, 200)), texts((20, 130, 200, 257, 300, 400), seed=2)


def results():
    """Name of a model -> what came out; empty before the first run."""
    return json.loads(RESULTS.read_text())["pooling"] if RESULTS.exists() else {}


class Judge:
    """A case's answers to some texts by transformers, and the cells of those by an engine: [word, detail]."""

    def __init__(self, case, prompts):
        self.case = case
        self.exact = answers(case, build(case).double(), prompts)
        self.exact_of_bfloat16, self.errors = in_bfloat16(case, prompts)

    def float32(self, found):
        error, bound = relative_errors(found["data"], self.exact).max(), float32_bound(self.errors)
        return ["equal" if error <= bound else "off", f"largest error {error:.1e}, admissible {bound:.1e}"]

    def bfloat16(self, found):
        errors = relative_errors(found["data"], self.exact_of_bfloat16)
        near = excess(errors, self.errors, in_blocks(self.case)) <= 1
        return ["as near" if near else "off", f"mean error {errors.mean():.1e}, of transformers' bfloat16 {self.errors.mean():.1e}"]  # fmt: skip

    def cache(self, found):
        """Of prompts that were asked before."""
        expected = [(len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for ids in LONG]
        if found["cached"] != expected:
            return ["no hit", f"{found['cached']} tokens came from the cache, not {expected}"]
        return self.float32(found)


def cells(name, found):
    """Column -> [word, detail], of what `pooling_runs.run` has found."""
    short = Judge(CASES[name], SHORT)
    judged = {"float32": short.float32, "tp": short.float32, "bfloat16": short.bfloat16}
    if name in CAUSAL:
        long = Judge(CASES[name], LONG)
        judged |= {"cache": long.cache, "chunked": long.float32}
    made = {column: ["-", ""] for column in HEADINGS}
    for column, judge in judged.items():
        made[column] = found[column] if isinstance(found[column], list) else judge(found[column])
    return made


def is_good(result):
    words = {column: word for column, (word, _) in result["cells"].items()}
    return set(words.values()) <= {"equal", "as near", "-"} | ({"refused"} if words["float32"] == "equal" else set())


def section():
    """Lines of the page."""
    models = results()
    yield from (
        "## Models that embed, classify and give rewards",
        "",
        "Vectors, classes and scores of texts of 1 to 200 tokens, beside those that transformers computes in float64: `equal` within what follows from the rounding of float32, `as near` as transformers'",
        "bfloat16 is. Prompts are cached and cut where a model is causal and its answer is that of the last token. Steps are not captured in graphs. `nox -s pooling` runs them.",
        "",
        f"| model | class | task | {' | '.join(HEADINGS.values())} |",
        "|---" * (3 + len(HEADINGS)) + "|",
    )
    for name, result in models.items():
        words = ("" if result["cells"][column][0] == "-" else result["cells"][column][0] for column in HEADINGS)
        yield f"| {name} | {result['model']} | {result['task']} | {' | '.join(words)} |"
    yield ""
    for name, result in models.items():
        why = {detail for word, detail in result["cells"].values() if word not in ("equal", "as near", "-")}
        yield from (f"* **{name}**: {' '.join(sentence.split())}" for sentence in sorted(why))
    yield ""
