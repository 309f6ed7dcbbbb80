# SPDX-License-Identifier: Apache-2.0
"""Run the cells and write what came out: python run.py --results FILE --page FILE --folder FOLDER [--only-refusals] [--left] [NAME ...].

A NAME is that of a cell ("LoRA x TP"), or of a feature, which stands for all its cells. Without names all are run. First vLLM is asked for the configuration of each cell; those that
it takes run two at a time, each engine in a process that is forked from one that has imported vLLM. The exit status is 1 where a cell neither works nor is refused.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_processes import EngineServers, data_parallel, end, end_with_stacks, rendezvous
from results import write

from features import models, page, verdict
from features.table import CELLS, FEATURES, ITSELF, STORAGE, digest, engine, kind_of_model, rounds

SIDE_BY_SIDE = 2
LIMIT = 200  # seconds for the engines of one cell: a safety net against hangs
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # fmt: skip


def arguments(names, folder, storage):
    """A cell's engine with its model; data parallel replicas as vLLM's option."""
    model = models.checkpoint(kind_of_model(names), folder)
    text = json.dumps(engine(names)).replace(f'"{ITSELF}"', json.dumps(str(model)))
    return {"model": str(model), **json.loads(text.replace(f'"{STORAGE}"', json.dumps(str(storage))))}


class Process:
    """A forked process, and the file that it prints to."""

    def __init__(self, servers, module, given, said, env):
        said.unlink(missing_ok=True)
        self.said, self.began = said, time.monotonic()
        self.process = servers.start(module, given, said, ENVIRONMENT | env)

    def has_ended(self):
        """Whether it has; after `LIMIT` it is ended."""
        if self.process.poll() is None:
            if time.monotonic() - self.began < LIMIT:
                return False
            end_with_stacks(self.process, self.said)
        return True

    def close(self):
        """Whether it has ended well; what is left of its session ends."""
        well = self.process.poll() == 0
        end(self.process)
        return well

    def wait(self):
        while not self.has_ended():
            time.sleep(0.1)
        if not self.close():
            sys.exit(f"{self.said}:\n{self.said.read_text(errors='replace')[-4000:]}")


def make_checkpoints(kinds, folder, servers):
    """Folder and reference of each kind of model; made anew where the file that makes them has changed."""
    stamp, made = Path(models.__file__).read_text(), {}
    running = []
    for kind in kinds:
        made[kind] = folder / "models" / kind.replace(", ", "-")
        if (made[kind] / "made_by.py").exists() and (made[kind] / "made_by.py").read_text() == stamp:
            continue
        shutil.rmtree(made[kind], ignore_errors=True)
        made[kind].mkdir(parents=True)
        running.append((kind, Process(servers, "features.models", [kind, made[kind]], made[kind] / "said.txt", {})))
    for kind, process in running:
        process.wait()
        (made[kind] / "made_by.py").write_text(stamp)
    return made


def refusals(cells, folder, made, servers):
    """What vLLM says to the configuration of each cell."""
    jobs = {name: arguments(names, made[kind_of_model(names)], folder / "storage") for name, names in cells.items()}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    Process(servers, "features.asking", [folder / "jobs.json", folder / "answers.json"], folder / "asked.txt", {}).wait()  # fmt: skip
    return json.loads((folder / "answers.json").read_text())


class Visit:
    """A cell whose engines run."""

    def __init__(self, name, folder, made, servers):
        self.name, self.names = name, CELLS[name]
        kind = kind_of_model(self.names)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.processes, self.expected = folder, [], []
        reference = json.loads((made[kind] / "reference.json").read_text())
        given = arguments(self.names, made[kind], folder / "storage")
        replicas = given.pop("data_parallel_size", 1)
        self.store = rendezvous() if replicas > 1 else None
        for rank in range(replicas):
            job = {"engine": given, "rounds": rounds(self.names), "media": str(made[kind])}
            job |= {"rendezvous": self.store.port} if self.store else {}
            more, expected = asked_of(self.names, reference, slice(rank, None, replicas), made[kind])
            (folder / f"job{rank}.json").write_text(json.dumps(job | more))
            self.expected.append(expected)
            files = [folder / f"job{rank}.json", folder / f"result{rank}.json"]
            env = data_parallel(rank, replicas) if replicas > 1 else {}
            self.processes.append(Process(servers, "features.trial", files, folder / f"said{rank}.txt", env))

    def has_ended(self):
        ended = [process.has_ended() for process in self.processes]
        failed = any(process.process.poll() for process, over in zip(self.processes, ended, strict=True) if over)
        return all(ended) or failed

    def cell(self):
        """The cell, when its engines have ended."""
        well = all([process.close() for process in self.processes])
        printed = "\n".join(process.said.read_text(errors="replace") for process in self.processes)
        if not well:
            return verdict.of_crash(printed)
        found = [json.loads((self.folder / f"result{rank}.json").read_text()) for rank in range(len(self.processes))]
        return verdict.of_runs(self.names, found, self.expected, printed)


def asked_of(names, reference, share, folder):
    """What a replica is asked, and what it must say."""
    requests = reference["requests"][share]
    if "pooling" in names:
        return {"requests": requests}, {"vectors": reference["vectors"][share], "bound": reference["bound"]}
    tokens = reference["tokens"][share]
    if "LoRA" not in names:
        return {"requests": requests}, {"tokens": tokens}
    adapters = [None] * len(requests) + [str(folder / "adapter")] * len(requests)
    return {"requests": requests * 2, "adapters": adapters}, {"tokens": tokens + reference["adapter"]["tokens"][share]}


def is_done(name, results):
    """Whether there is a good result of a cell in its present form."""
    result = results.get(name)
    return result is not None and result["digest"] == digest(CELLS[name]) and verdict.is_good(result["cell"])


def run_cells(waiting, folder, made, servers, done, seconds):
    """Run cells, `SIDE_BY_SIDE` at a time; `done(name, cell, seconds)` after each. None is started later than after so many seconds."""
    waiting, running, began_all = list(waiting), [], time.monotonic()
    while waiting or running:
        if time.monotonic() - began_all > seconds:
            waiting = []
        while waiting and len(running) < SIDE_BY_SIDE:
            name = waiting.pop(0)
            running.append((Visit(name, folder / "runs" / name.replace(" ", "_"), made, servers), time.monotonic()))
        for visit, began in list(running):
            if visit.has_ended():
                running.remove((visit, began))
                done(visit.name, visit.cell(), time.monotonic() - began)
        time.sleep(0.1)


def chosen(names):
    """The cells of names."""
    if unknown := [name for name in names if name not in CELLS]:
        sys.exit(f"no cell or feature is called {', '.join(map(repr, unknown))}; features: {', '.join(FEATURES)}")
    return {cell: of for cell, of in CELLS.items() if not names or cell in names or set(of).intersection(names)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints, and what the runs said")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no engine later than after so many seconds"
    )
    parser.add_argument("--left", action="store_true", help="run the cells that have no good result yet")
    parser.add_argument("--only-refusals", action="store_true", help="ask for configurations and start no engine")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())["cells"] if options.results.exists() else {}
    cells = {name: of for name, of in chosen(options.names).items() if not (options.left and is_done(name, results))}
    options.folder.mkdir(parents=True, exist_ok=True)
    servers, began, bad = EngineServers(options.folder), time.monotonic(), []

    def done(name, cell, seconds):
        results[name] = {"digest": digest(CELLS[name]), "cell": cell}
        print(f"{name}: {' '.join(filter(None, cell))} ({seconds:.0f} s)", flush=True)
        if not verdict.is_good(cell):
            bad.append(name)
        in_order = {name: results[name] for name in CELLS if name in results}
        write(options.results, "cells", in_order, options.page, page.render)

    try:
        made = make_checkpoints({kind_of_model(names) for names in cells.values()}, options.folder, servers)
        said = refusals(cells, options.folder, made, servers)
        for name in cells:
            if said[name] is not None:
                kind = kind_of_model(CELLS[name])
                done(name, verdict.of_refusal(said[name], models.checkpoint(kind, made[kind])), 0)
            elif results.get(name, {}).get("cell", [""])[0] == "refused":
                del results[name]  # it is taken now
        if not options.only_refusals:
            wanted = [name for name in cells if said[name] is None]
            run_cells(wanted, options.folder, made, servers, done, options.seconds)
    finally:
        servers.close()
    print(f"{len(cells)} cells in {(time.monotonic() - began) / 60:.1f} minutes")
    if bad:
        sys.exit(f"neither working nor refused at the start: {'; '.join(bad)}")


if __name__ == "__main__":
    main()
