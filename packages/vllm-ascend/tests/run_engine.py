# SPDX-License-Identifier: Apache-2.0
"""Run vLLM engines as a job describes and write what they said. Started as a process of its own by the tests.

python run_engine.py JOB.json RESULT.json
"""

import gc
import json
import sys


def generate(llm, run):
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in run["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(**run["sampling"]), use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
            "logprobs": [
                {str(token): entry.logprob for token, entry in step.items()}
                for step in output.outputs[0].logprobs or []
            ],
        }
        for output in outputs
    ]


def preemptions(llm):
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def main(job_file, result_file):
    from vllm import LLM

    with open(job_file) as handle:
        job = json.load(handle)
    results = []
    for engine in job:
        llm = LLM(enforce_eager=True, disable_log_stats=False, **engine["engine"])
        results.append({"runs": [generate(llm, run) for run in engine["runs"]], "preemptions": preemptions(llm)})
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    with open(result_file, "w") as handle:
        json.dump(results, handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
