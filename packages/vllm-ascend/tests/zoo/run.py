# SPDX-License-Identifier: Apache-2.0
"""Serve the zoo's architectures and write what came out: python run.py [--results FILE] [--page FILE] [--folder FOLDER] [NAME ...]
[--kinds KIND ...].

Two architectures run at a time, each run in a process of its own, forked from one that has imported vLLM. A NAME stands for the entry of that name, or
for every entry whose name begins with it. The exit status is 1 where a result is neither equal, nor refused at the start, nor explained by the entry.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_processes import EngineServers, end, end_with_stacks
from results import write

from zoo import ENTRIES, page, verdict
from zoo.trial import KINDS, ONE_PROCESS, STRICT

SIDE_BY_SIDE = 2
LIMIT = 400  # seconds for one run: a safety net against hangs


class Visit:
    """One entry on its way through its runs."""

    def __init__(self, entry, folder, servers, kinds=KINDS):
        self.entry, self.folder, self.servers, self.kinds = entry, folder, servers, kinds
        self.ended, self.seconds = {}, {}
        self.left = ["reference", *(kind for kind in kinds if kind != "ep" or entry.experts)]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.next()

    def next(self):
        """Start the next run; False where there is none."""
        if not self.left or "reference" in self.ended or verdict.refused(self.folder):
            return False
        self.kind = self.left.pop(0)
        self.said, self.began = self.folder / f"{self.kind}.txt", time.monotonic()
        arguments = [self.entry.name, self.folder]
        if self.kind == "reference":
            self.process = self.servers.start("zoo.reference", arguments, self.said, ONE_PROCESS)
        else:
            env = ONE_PROCESS | (STRICT if self.kind == "bfloat16" else {})
            self.process = self.servers.start("zoo.trial", [*arguments, self.kind], self.said, env)
        return True

    def step(self):
        """Look at the run; False where the last one has ended."""
        if self.process.poll() is None:
            if time.monotonic() - self.began < LIMIT:
                return True
            end_with_stacks(self.process, self.said)
            self.ended[self.kind] = f"had not ended after {LIMIT} s"
        elif self.process.returncode:
            raised = verdict.raised_in(self.said.read_text(errors="replace")) or ["it said nothing"]
            self.ended[self.kind] = f"ended with status {self.process.returncode}: {raised[-1]}"
        end(self.process)
        self.seconds[self.kind] = round(time.monotonic() - self.began, 1)
        return self.next()

    def result(self, earlier=None):
        """What goes into the file of results. A kind that was not to be run now keeps what an earlier run of the same entry said."""
        digest = verdict.digest(self.entry)
        cells = verdict.cells(self.entry, self.folder, self.ended, self.kinds)
        if earlier and earlier["entry"] == digest:
            kept = {
                column: earlier["cells"].get(column, cell) for column, cell in cells.items() if cell[0] == "not run"
            }
            cells |= kept
        return {"task": self.entry.task, "model": self.entry.model, "entry": digest, "cells": cells}


def chosen(names):
    """The entries whose names begin with one of the names; all without names."""
    if unknown := [name for name in names if not any(entry.startswith(name) for entry in ENTRIES)]:
        sys.exit(f"no entry begins with {', '.join(map(repr, unknown))}; there are: {'; '.join(ENTRIES)}")
    begin_so = tuple(name for name in names if name not in ENTRIES)
    return [entry for name, entry in ENTRIES.items() if not names or name in names or name.startswith(begin_so)]


def visit_all(entries, folder, servers, done, kinds=KINDS):
    """Visit the entries, `SIDE_BY_SIDE` at a time; `done(entry, visit)` after each."""
    waiting, running = list(entries), []
    while waiting or running:
        while waiting and len(running) < SIDE_BY_SIDE:
            entry = waiting.pop(0)
            running.append(Visit(entry, folder / entry.name.replace(" ", "_").replace(",", ""), servers, kinds))
        for visit in list(running):
            if not visit.step():
                running.remove(visit)
                done(visit.entry, visit)
        time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and what the runs said")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        help="runs to make, the results of others are kept; default: all",
    )
    options = parser.parse_args()
    entries = chosen(options.names)
    kept = json.loads(options.results.read_text())["models"] if options.results.exists() else {}
    results, bad = {name: kept[name] for name in ENTRIES if name in kept}, []

    def done(entry, visit):
        results[entry.name] = visit.result(results.get(entry.name))
        said = {column: word for column, (word, _) in results[entry.name]["cells"].items()}
        if not verdict.is_good(results[entry.name]) and not entry.known:
            bad.append(entry.name)
        print(f"{entry.name}: {said} {visit.seconds}", flush=True)
        in_order = {name: results[name] for name in ENTRIES if name in results}
        write(options.results, "models", in_order, options.page, page.render)

    began = time.monotonic()
    servers = EngineServers(options.folder)
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        visit_all(entries, options.folder, servers, done, options.kinds)
    finally:
        servers.close()
    print(f"{len(entries)} architectures in {(time.monotonic() - began) / 60:.1f} minutes")
    if bad:
        sys.exit(f"neither equal nor refused at the start: {', '.join(bad)}")


if __name__ == "__main__":
    main()
