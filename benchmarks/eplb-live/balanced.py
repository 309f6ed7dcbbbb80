# SPDX-License-Identifier: Apache-2.0
"""One engine with a stream that needs no rebalancing: python balanced.py JOB.json RESULT.json. Started by run.py, with experts that may move and without.

Tensor parallel ranks share the experts, which lie where a plan for this very stream puts them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

REPEATS = 3


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
    }


def main(job_file, result_file):
    """Run one job."""
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    llm = LLM(**job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)

    def answer():
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    answer()
    before, best = llm.collective_rpc(work)[0], float("inf")
    for _ in range(REPEATS):
        begun, one = time.perf_counter(), llm.collective_rpc(work)[0]
        answers = answer()
        seconds = time.perf_counter() - begun
        best = min(best, seconds / (llm.collective_rpc(work)[0]["steps"] - one["steps"]))
    after = llm.collective_rpc(work)[0]
    llm.llm_engine.engine_core.shutdown()
    found = {name: after[name] - before[name] for name in after}
    Path(result_file).write_text(json.dumps(found | {"answers": answers, "step_seconds": best}))


if __name__ == "__main__":
    main(*sys.argv[1:])
