# SPDX-License-Identifier: Apache-2.0
"""Generate for minutes, after one line with the workers' process ids. Started by the tests, which then take something away.

python run_long.py ENGINE.json
"""

import json
import os
import sys

from run_engine import start


def process_id(worker):
    return os.getpid()


def main(engine_file):
    from vllm import SamplingParams

    with open(engine_file) as handle:
        llm = start(skip_tokenizer_init=True, **json.load(handle))

    def generate(tokens):
        options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 2, options, use_tqdm=False)

    generate(4)
    print("workers", *llm.collective_rpc(process_id), flush=True)
    generate(8000)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
