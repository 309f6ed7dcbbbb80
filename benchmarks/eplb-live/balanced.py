# SPDX-License-Identifier: Apache-2.0
"""Engines with a stream that needs no rebalancing: python balanced.py JOB.json RESULT.json. Started by run.py.

Their experts may move, or stay; tensor parallel ranks share them, and they lie where a plan for this very stream puts them. The engines are there at the
same time and take turns, so that a machine that becomes slower or faster meanwhile does so for all of them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

WARM, TURNS = 2, 9


def work(worker):
    """What the first rank has launched and sent so far, its steps, and what its rebalancer has done."""
    from ascend_sim import counters

    counts = counters.snapshot()
    status = None if worker.model_runner.rebalancer is None else worker.model_runner.rebalancer.status
    return {
        "operators": sum(count.calls for count in counts.operators.values()),
        "steps": counts.operators["aten::argmax"].calls,  # greedy sampling has one a step
        "collectives": sum(count.calls for count in counts.collectives.values()),
        "intervals": 0 if status is None else status.intervals,
        "moves": 0 if status is None else status.moves,
        "seconds_of_moving": worker.model_runner.seconds_of_moving[0],
    }


class Way:
    """One engine, and what it has done in its turns."""

    def __init__(self, engine, prompts, tokens):
        from vllm import LLM, SamplingParams

        self.llm = LLM(**engine)
        self.llm.collective_rpc(time_hooks)
        self.sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.prompts = [{"prompt_token_ids": ids} for ids in prompts]
        self.seconds, self.before = [], None

    def work(self):
        return self.llm.collective_rpc(work)[0]

    def take_a_turn(self):
        """Answer the whole stream."""
        began = time.perf_counter()
        outputs = self.llm.generate(self.prompts, self.sampling, use_tqdm=False)
        self.seconds.append(time.perf_counter() - began)
        self.answers = [list(output.outputs[0].token_ids) for output in outputs]

    def found(self):
        after = self.work()
        return {name: after[name] - self.before[name] for name in after} | {
            "answers": self.answers,
            "seconds": self.seconds[WARM:],
        }


def time_hooks(worker):
    """Let the first rank add up the seconds that it spends in what moving experts adds to its steps."""
    from vllm_ascend.eplb.observe import CountedRows

    spent = worker.model_runner.seconds_of_moving = [0.0]

    def timed(method):
        def run(*args, **kwargs):
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - began

        return run

    rebalancer = worker.model_runner.rebalancer
    if rebalancer is not None:
        rebalancer.step = timed(rebalancer.step)
        CountedRows.begin, CountedRows.add = timed(CountedRows.begin), timed(CountedRows.add)


def main(job_file, result_file):
    """Run one job."""
    job = json.loads(Path(job_file).read_text())
    ways = {name: Way(engine, job["prompts"], job["tokens"]) for name, engine in job["ways"].items()}
    for turn in range(WARM + TURNS):
        for way in list(ways.values())[:: -1 if turn % 2 else 1]:  # neither always goes first
            if turn == WARM:
                way.before = way.work()
            way.take_a_turn()
    found = {name: way.found() for name, way in ways.items()}
    for way in ways.values():
        way.llm.llm_engine.engine_core.shutdown()
    Path(result_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
