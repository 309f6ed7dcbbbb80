# SPDX-License-Identifier: Apache-2.0
"""Generate for minutes, after one line with the workers' process ids. Started by the tests, which then take something away.

python run_long.py ENGINE.json
"""

import json
import os
import sys


def process_id(worker):
    return os.getpid()


def main(engine_file):
    from vllm import LLM, SamplingParams

    with open(engine_file) as handle:
        llm = LLM(enforce_eager=True, skip_tokenizer_init=True, **json.load(handle))
    print("workers", *llm.collective_rpc(process_id), flush=True)
    options = SamplingParams(temperature=0, max_tokens=8000, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 2, options, use_tqdm=False)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
