# SPDX-License-Identifier: Apache-2.0
"""docs/models.md, from the results of runs."""

from zoo import ENTRIES, pooling, towers
from zoo.verdict import COLUMNS, is_good

HEADINGS = {
    "float32": "float32", "cache": "prefix cache", "chunked": "chunks", "tp": "TP 2", "pp": "PP 2", "ep": "EP 2", "bfloat16": "strict bfloat16", "graphs": "graphs", "tower": "tower",
}  # fmt: skip
SHOWN = {"-": ""}
INTRODUCTION = """# Models

Written by `nox -s models` from its runs; do not edit. One model of a kind is run by the tests too (`test_zoo.py`).

Each architecture is a tiny checkpoint with random weights, made from its own config class in transformers {transformers}, and served by vLLM {vllm} on the
simulated NPU. Greedy tokens of prompts of 3 to 200 tokens (or of texts without, with one and with two pictures, videos or sounds) are compared with those
of a whole forward pass of transformers for every token.

| column | what runs | what it says |
|---|---|---|
| float32 | whole prompts, then decoding | `equal`: every token is. Else how many tokens are the most likely one after transformers' own tokens, of how many |
| prefix cache | the same requests again; those beyond a block of 128 tokens must come from the cache. Two of them differ in their picture alone | `equal` |
| chunks | prompts in chunks of 32 tokens | `equal`, or how many tokens are, up to the first that is not |
| TP 2, PP 2, EP 2 | tensor parallelism over two ranks; two pipeline stages; tensor and expert parallelism over two ranks | likewise; `refused` at the start where vLLM has no right stages for a model |
| strict bfloat16 | log-probabilities of the prompts' tokens where kernels refuse what their documentation does | `as near`: as near to float32 as transformers' bfloat16 is, by the bound of `tests/rounding.py` |
| graphs | the first column's run | `captured`: decoding steps were replays of captured graphs; else every step ran operator by operator |
| tower | attention of what reads pictures, videos or sounds | `kernel`: all of it is the NPU's kernel; `torch`: some is torch's |

`refused` models are refused at the start, with the reason below. **Of {all}, {good} are equal in every way, {partly} are in all that was run (`not run` marks the rest), {refused} are refused at the start, {other} are neither.**
"""


def counts(models):
    good = [result for result in models.values() if is_good(result)]
    refused = sum(result["cells"]["float32"][0] == "refused" for result in good)
    partly = sum(["not run", ""] in result["cells"].values() for result in good)
    return {
        "all": len(models), "refused": refused, "partly": partly, "good": len(good) - refused - partly, "other": len(models) - len(good),
    }  # fmt: skip


def row(name, result):
    cells = [SHOWN.get(word, word) for word, _ in result["cells"].values()]
    return f"| {name} | {result['model']} | {result['task']} | {' | '.join(cells)} |"


def one_line(text):
    return " ".join(text.split()).replace("|", "\\|")


def notes(models):
    """Of each model that is not equal in every way, why, as far as it is known."""
    for name, result in models.items():
        found = {}
        for column, (word, detail) in result["cells"].items():
            if detail and word != "as near":
                found.setdefault((word, detail), []).append(HEADINGS[column])
        said = []
        for (word, detail), columns in found.items():
            said.append(
                f"{one_line(detail)[:400]}"
                if word == "refused"
                else f"{', '.join(columns)}: {word}, {one_line(detail)[:400]}"
            )
        if (known := ENTRIES[name].known) and not is_good(result):
            said.append(known)
        if said:
            yield f"* **{name}**: {'; '.join(said)}"


def render(results):
    """The page."""
    models = {name: result for name, result in results["models"].items() if name in ENTRIES}
    lines = [INTRODUCTION.format(**results["versions"], **counts(models))]
    lines += [
        f"| architecture | class | task | {' | '.join(HEADINGS[column] for column in COLUMNS)} |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    lines += [row(name, result) for name, result in models.items()]
    if left := [name for name in ENTRIES if name not in models]:
        lines += ["", f"Not run yet: {'; '.join(left)}."]
    lines += ["", "## Reasons", "", *notes(models), "", *pooling.section(), *towers.section()]
    return "\n".join(lines)
