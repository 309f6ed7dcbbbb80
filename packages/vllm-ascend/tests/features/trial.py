# SPDX-License-Identifier: Apache-2.0
"""The engine of one cell, or one of its replicas: trial.main(JOB.json, RESULT.json)."""

import json
import os
from functools import partial
from pathlib import Path

import run_engine
from zoo.trial import asked, sampling

from features.models import TOKENS

MOST_RUNS = 40  # until experts have moved


def look_at_classes_here():
    """vLLM looks at a model's class in a process of its own, which imports everything anew, in order not to initialise a device here."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def generated(llm, prompts, adapters):
    requests = None if adapters is None else [run_engine.adapter(folder) for folder in adapters]
    outputs = llm.generate(prompts, sampling(max_tokens=TOKENS, ignore_eos=True), use_tqdm=False, lora_request=requests)
    return {
        "said": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
    }


def pooled(llm, prompts):
    outputs = llm.encode(prompts, pooling_task="embed", use_tqdm=False)
    return {
        "said": [output.outputs.data.double().tolist() for output in outputs],
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
    }


def main(job_file, result_file):
    look_at_classes_here()
    job = json.loads(Path(job_file).read_text())
    llm = run_engine.start(job.get("rendezvous"), disable_log_stats=False, **job["engine"])
    prompts = asked(job["requests"], Path(job["media"]), "images")
    if job["engine"].get("runner") == "pooling":
        say = partial(pooled, llm, prompts)
    else:
        say = partial(generated, llm, prompts, job.get("adapters"))
    rounds = []
    for actions in job["rounds"]:
        refused = [run_engine.act(llm, False, *action)["said"] for action in actions]
        rounds.append(say() | {"refused": [reason for reason in refused if reason]})
    moved = llm.collective_rpc(run_engine.rebalances)[0]
    if moved is not None:
        # All replicas end a run in the same step, so they go on equally long.
        while moved["moves"] == 0 and len(rounds) < MOST_RUNS:
            rounds.append(say() | {"refused": []})
            moved = llm.collective_rpc(run_engine.rebalances)[0]
    result = {
        "rounds": rounds,
        "from_host": run_engine.cached_by_source(llm).get("host", 0),
        "accepted": run_engine.speculation(llm).get("accepted_tokens") or 0,
        "replays": llm.collective_rpc(run_engine.graphs)[0]["replays"],
        "moved": moved,
    }
    written = Path(f"{result_file}.new")
    written.write_text(json.dumps(result))
    os.replace(written, result_file)
    llm.llm_engine.engine_core.shutdown()
