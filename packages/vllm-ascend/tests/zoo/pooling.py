# SPDX-License-Identifier: Apache-2.0
"""Models that embed, classify and give rewards: python pooling.py --folder FOLDER [NAME ...] runs them, and writes docs/pooling.json and their section of docs/models.md.

The exit status is 1 where an answer is not as near to transformers' as `pooling_errors.py` says, and not refused at the start either.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from engine_processes import EngineServers, wait
from pooling_errors import float32_bound, in_bfloat16, in_blocks, relative_errors
from pooling_models import CASES, answers, build, save, texts
from results import put, write
from rounding import excess
from run_pooling import SMALL

from zoo import verdict

DOCS = Path(__file__).parents[4] / "docs"
RESULTS = DOCS / "pooling.json"
HEADINGS = {"float32": "float32", "cache": "prefix cache", "chunked": "chunks", "tp": "TP 2", "bfloat16": "strict bfloat16"}  # fmt: skip
CAUSAL = ("qwen3-embedding", "gte-qwen2", "qwen3-classifier")
"""Whose answer is that of the last token, so that vLLM caches and cuts their prompts."""
LENGTHS, LONG = (1, 2, 7, 16, 33, 64, 129, 200), (20, 130, 200, 257, 300, 400)
BLOCK = 128
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


def engines(name):
    """Kind of run -> options of its engine, its texts, and the environment."""
    short, relaxed = texts(LENGTHS), ONE_PROCESS | {"ASCEND_SIM_STRICT": "0"}
    yield "float32", {"dtype": "float32"}, [short], relaxed
    yield "tp", {"dtype": "float32", "tensor_parallel_size": 2}, [short], relaxed
    yield "bfloat16", {"dtype": "bfloat16"}, [short], ONE_PROCESS | {"ASCEND_SIM_STRICT": "1"}
    if name in CAUSAL:
        long = texts(LONG, seed=2)
        cut = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "enable_prefix_caching": True, "enable_chunked_prefill": True}  # fmt: skip
        yield "chunked", {"dtype": "float32", **cut}, [long, long], relaxed


def run(name, folder, servers):
    """Kind of run -> what its engine said, or [word, why] where there was none."""
    case, found = CASES[name], {}
    (folder / "model").mkdir(parents=True, exist_ok=True)
    save(case, folder / "model")
    for kind, options, rounds, env in engines(name):
        job, result, said = (folder / f"{kind}{end}" for end in (".json", ".pt", ".txt"))
        said.unlink(missing_ok=True)
        engine = {"model": str(folder / "model"), **SMALL, **case.engine, **options}
        runs = [{"kind": "pool", "task": case.task, "prompts": prompts} for prompts in rounds]
        job.write_text(json.dumps([{"engine": engine, "runs": runs}]))
        try:
            wait([servers.start("run_pooling", [job, result], said, env)], [said])
        except AssertionError:
            printed = said.read_text(errors="replace")
            refused = "ValidationError" in printed
            found[kind] = ["refused" if refused else "failed", refusal(printed) if refused else verdict.raised_in(printed)[-1]]  # fmt: skip
        else:
            found[kind] = torch.load(result)[0]
    return found


def refusal(printed):
    """The sentence of a refusal in what an engine printed."""
    return printed.rpartition("Value error, ")[2].partition(" [type=")[0]


def of_float32(case, found, prompts):
    errors = relative_errors(found["data"], answers(case, build(case).double(), prompts))
    bound = float32_bound(case, prompts)
    return ["equal" if errors.max() <= bound else "off", f"largest error {errors.max():.1e}, admissible {bound:.1e}"]


def of_bfloat16(case, found, prompts):
    exact, reference = in_bfloat16(case, prompts)
    errors = relative_errors(found["data"], exact)
    near = excess(errors, reference, in_blocks(case)) <= 1
    return ["as near" if near else "off", f"mean error {errors.mean():.1e}, of transformers' bfloat16 {reference.mean():.1e}"]  # fmt: skip


def cells(name, found):
    """Column -> [word, detail]."""
    case, short, long = CASES[name], texts(LENGTHS), texts(LONG, seed=2)
    made = {column: ["-", ""] for column in HEADINGS}
    for kind in found.keys() & HEADINGS.keys():
        if isinstance(found[kind][0], str):
            made[kind] = found[kind]
        elif kind == "bfloat16":
            made[kind] = of_bfloat16(case, found[kind][0], short)
        else:
            made[kind] = of_float32(case, found[kind][0], long if kind == "chunked" else short)
    if name in CAUSAL and made["chunked"][0] not in ("refused", "failed"):
        again = found["chunked"][1]
        expected = [(length - 1) // BLOCK * BLOCK for length in LONG]
        hit = again["cached"] == expected
        made["cache"] = of_float32(case, again, long) if hit else ["no hit", f"{again['cached']} tokens came from the cache, not {expected}"]  # fmt: skip
    return made


def is_good(result):
    words = {column: word for column, (word, _) in result["cells"].items()}
    return set(words.values()) <= {"equal", "as near", "-"} | ({"refused"} if words["float32"] == "equal" else set())


def section():
    """Lines of the page."""
    models = json.loads(RESULTS.read_text())["pooling"] if RESULTS.exists() else {}
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


def main():
    from zoo import page

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and what the runs said")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CASES):
        sys.exit(f"there is no {', '.join(sorted(unknown))}; there are: {'; '.join(CASES)}")
    kept = json.loads(RESULTS.read_text())["pooling"] if RESULTS.exists() else {}
    options.folder.mkdir(parents=True, exist_ok=True)
    servers, bad = EngineServers(options.folder), []
    try:
        for name in options.names or CASES:
            found = cells(name, run(name, options.folder / name, servers))
            config = json.loads((options.folder / name / "model" / "config.json").read_text())
            kept[name] = {"task": CASES[name].task, "model": config["architectures"][0], "cells": found}
            bad += [] if is_good(kept[name]) else [name]
            print(f"{name}: {found}", flush=True)
            write(RESULTS, "pooling", {name: kept[name] for name in CASES if name in kept}, None, None)
    finally:
        servers.close()
    put(DOCS / "models.md", page.render(json.loads((DOCS / "models.json").read_text())))
    if bad:
        sys.exit(f"neither equal nor refused at the start: {', '.join(bad)}")


if __name__ == "__main__":
    main()
