# SPDX-License-Identifier: Apache-2.0
"""Models that embed, classify and give rewards: python pooling_runs.py --folder FOLDER [NAME ...] runs them, and writes docs/pooling.json and their section of docs/models.md.

The exit status is 1 where an answer is not as near to transformers' as `pooling_errors.py` says, and not refused at the start either.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from engine_processes import EngineServers, wait
from pooling_models import CASES, save
from results import put, write
from run_pooling import SMALL

from zoo import page, pooling, verdict
from zoo.trial import ONE_PROCESS, STRICT


def engines(name):
    """(columns that the rounds of texts stand for, options of the engine, texts of each round, environment) of each engine."""
    yield ["float32"], {"dtype": "float32"}, [pooling.SHORT], {}
    yield ["tp"], {"dtype": "float32", "tensor_parallel_size": 2}, [pooling.SHORT], {}
    yield ["bfloat16"], {"dtype": "bfloat16"}, [pooling.SHORT], STRICT
    if name in pooling.CAUSAL:
        cut = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "enable_prefix_caching": True, "enable_chunked_prefill": True}  # fmt: skip
        yield ["chunked", "cache"], {"dtype": "float32", **cut}, [pooling.LONG] * 2, {}


def run(name, folder, servers):
    """Column -> what an engine said, or [word, why] where there was none."""
    case, found, model = CASES[name], {}, folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    save(case, model)
    for columns, options, rounds, env in engines(name):
        job, result, said = (folder / f"{columns[0]}{end}" for end in (".json", ".pt", ".txt"))
        said.unlink(missing_ok=True)
        runs = [{"kind": "pool", "task": case.task, "prompts": prompts} for prompts in rounds]
        job.write_text(json.dumps([{"engine": {"model": str(model), **SMALL, **case.engine, **options}, "runs": runs}]))
        try:
            wait([servers.start("run_pooling", [job, result], said, ONE_PROCESS | env)], [said])
            answered = torch.load(result)[0]
        except AssertionError:
            answered = [refused_or_failed(said.read_text(errors="replace"))] * len(columns)
        found |= dict(zip(columns, answered, strict=True))
    return found


def refused_or_failed(printed):
    """[word, why], of what an engine has printed that did not answer."""
    if "ValidationError" in printed:
        return ["refused", printed.rpartition("Value error, ")[2].partition(" [type=")[0]]
    return ["failed", verdict.raised_in(printed)[-1]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and what the runs said")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CASES):
        sys.exit(f"there is no {', '.join(sorted(unknown))}; there are: {'; '.join(CASES)}")
    results, bad = pooling.results(), []
    options.folder.mkdir(parents=True, exist_ok=True)
    servers = EngineServers(options.folder)
    try:
        for name in options.names or CASES:
            cells = pooling.cells(name, run(name, options.folder / name, servers))
            config = json.loads((options.folder / name / "model" / "config.json").read_text())
            results[name] = {"task": CASES[name].task, "model": config["architectures"][0], "cells": cells}
            bad += [] if pooling.is_good(results[name]) else [name]
            print(f"{name}: {cells}", flush=True)
            write(pooling.RESULTS, "pooling", {name: results[name] for name in CASES if name in results}, None, None)
    finally:
        servers.close()
    docs = pooling.RESULTS.parent
    put(docs / "models.md", page.render(json.loads((docs / "models.json").read_text())))
    if bad:
        sys.exit(f"neither equal nor refused at the start: {', '.join(bad)}")


if __name__ == "__main__":
    main()
