# SPDX-License-Identifier: Apache-2.0
"""Run vLLM engines that embed, classify or score, as a job describes, and write what they said. Started as a process of its own by the tests.

python run_pooling.py JOB.json RESULT.pt
"""

import gc
import json
import sys


def pool(llm, run):
    """What the model says of each text, and how many of its tokens came from the cache."""
    import torch

    prompts = [{"prompt_token_ids": ids} for ids in run["prompts"]]
    outputs = llm.encode(prompts, pooling_task=run["task"], use_tqdm=False)
    return {
        "data": [torch.as_tensor(output.outputs.data).double().cpu() for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
    }


def main(job_file, result_file):
    import torch
    from vllm import LLM

    with open(job_file) as handle:
        job = json.load(handle)
    results = []
    for engine in job:
        llm = LLM(runner="pooling", enforce_eager=True, **engine["engine"])
        results.append([pool(llm, run) for run in engine["runs"]])
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    torch.save(results, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
