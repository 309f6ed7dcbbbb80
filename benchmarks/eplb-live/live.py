# SPDX-License-Identifier: Apache-2.0
"""One engine with a stream of requests whose kind drifts: python live.py JOB.json RESULT.json. Started by run.py, once for each way.

Four data parallel ranks share the experts of the first layers of the upcycled SmolLM2. Requests go to the ranks in turn. Most of them are of one kind,
and which one it is changes from phase to phase, and with it the experts that its tokens choose.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

RANKS = 4


def watch(worker):
    """Let the rebalancer of one worker note its loads of ranks after each interval, and how long each step has waited. On the first rank that is all."""
    rebalancer = worker.model_runner.rebalancer
    worker.eplb_seen = {"rank_loads": [], "waited": [], "moved": []}
    if rebalancer is None:
        return
    from vllm_ascend.eplb.report import Status

    class Watched(Status):
        """A status that keeps what it is told."""

        __slots__ = ("seen",)

        def observed(self, loads):
            super().observed(loads)
            self.seen["rank_loads"].append(loads.tolist())

        def step_waited(self, seconds):
            super().step_waited(seconds)
            self.seen["waited"].append(seconds)
            if not self.seen["moved"] or self.seen["moved"][-1] != self.moves:
                self.seen["moved"].append(self.moves)

    rebalancer.status = watched = Watched()
    watched.seen = worker.eplb_seen


def seen(worker):
    """What `watch` has noted, and the status."""
    rebalancer = worker.model_runner.rebalancer
    if rebalancer is None:
        return {"steps": getattr(worker, "eplb_steps", 0)}
    status = rebalancer.status
    numbers = {name: getattr(status, name) for name in ("intervals", "rebalances", "moves", "bytes_moved", "background_seconds", "failures")}  # fmt: skip
    return worker.eplb_seen | numbers | {"dropped": status.dropped, "steps": rebalancer._step}


async def stream(job):
    """Start the engine, send the phases, and return what came of them."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job["engine"]))
    options = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )  # fmt: skip

    async def ask(number, prompt):
        prompt = {"prompt_token_ids": prompt}
        async for output in engine.generate(prompt, options, str(number), data_parallel_rank=number % RANKS):
            answer = list(output.outputs[0].token_ids)
        return answer

    try:
        await asyncio.gather(*(ask(number, job["warm"]) for number in range(-RANKS, 0)))
        await engine.collective_rpc(watch)
        answers, began, number, ends = [], time.perf_counter(), 0, []
        for phase in job["phases"]:
            answers += await asyncio.gather(*(ask(number + place, prompt) for place, prompt in enumerate(phase)))
            number += len(phase)
            (now,) = await engine.collective_rpc(seen)
            ends.append(now.get("intervals", 0))
        seconds = time.perf_counter() - began
        (found,) = await engine.collective_rpc(seen)
        return found | {"answers": answers, "seconds": seconds, "phase_ends": ends}
    finally:
        engine.shutdown()


def main(job, result):
    """Run one job."""
    found = asyncio.run(stream(json.loads(Path(job).read_text())))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
