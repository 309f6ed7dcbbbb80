# SPDX-License-Identifier: Apache-2.0
"""One run of an entry's engines: `trial.main(name, folder, kind)` writes `KIND.json` into the folder after every engine.

Each engine's outcome is {"refused": reason}, {"failed": what was raised}, or what its runs said.
"""

import gc
import json
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from zoo import media

SMALL = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 32 << 20}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
STRICT = {"ASCEND_SIM_STRICT": "1"}
KINDS = ("one", "tp", "pp", "ep", "bfloat16")
"""float32 on one rank (whole prompts, then from the prefix cache, then in chunks), over ranks, over pipeline stages, with expert parallelism; strict bfloat16."""


def sampling(**more):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, detokenize=False, **more)


def asked(requests, folder, task):
    """vLLM's prompts."""
    prompts = []
    for request in requests:
        prompt = {"prompt_token_ids": request["ids"]}
        given = {"multi_modal_data": media.for_vllm(task, folder, request["media"])} if request.get("media") else {}
        if request.get("encoded"):
            prompts.append({"encoder_prompt": {"prompt": "", **given}, "decoder_prompt": prompt})
        else:
            prompts.append(prompt | given)
    return prompts


def generated(llm, prompts, new_tokens):
    """Greedy tokens of each prompt, and how many of its own came from the prefix cache; and the prompt's ids, where vLLM puts those of media into it."""
    outputs = llm.generate(prompts, sampling(max_tokens=new_tokens, ignore_eos=True), use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "prompts": [list(output.prompt_token_ids) for output in outputs],
    }


def cached_block(llm):
    """Tokens by which the prefix cache counts: of a block, or the least common multiple where layers have blocks of several sizes; 0 for a model with a recurrent state for which vLLM leaves it off."""
    cache = llm.llm_engine.vllm_config.cache_config
    if cache.mamba_block_size is None:
        return llm.llm_engine.engine_core.engine_core.scheduler.block_size
    return cache.enable_prefix_caching * cache.mamba_block_size


def own_logprobs(llm, prompts):
    """(log-probability, rank) of each prompt's own tokens but the first."""
    outputs = llm.generate(prompts, sampling(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return [
        [
            (step[token].logprob, step[token].rank)
            for step, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        ]
        for output in outputs
    ]


@contextmanager
def counted_attention():
    """Inside, calls of torch's own attention are counted in the list of one number that this yields: a tower on NPU kernels has none."""
    from torch.nn import functional

    calls, own = [0], functional.scaled_dot_product_attention

    def counting(*args, **kwargs):
        calls[0] += 1
        return own(*args, **kwargs)

    functional.scaled_dot_product_attention = counting
    try:
        yield calls
    finally:
        functional.scaled_dot_product_attention = own


def run_one(llm, reference, ask):
    from ascend_sim import counters

    before = counters.snapshot().graphs.replays
    with counted_attention() as calls:
        said = run_whole(llm, reference, ask) | {"of_torch": calls[0]}
    return said | {"replays": counters.snapshot().graphs.replays - before}


def run_whole(llm, reference, ask):
    new = len(reference["tokens"][0])
    answered = [
        {**request, "ids": request["ids"] + tokens}
        for request, tokens in zip(reference["requests"], reference["tokens"], strict=True)
    ]
    return {
        "whole": generated(llm, ask(reference["requests"]), new),
        "again": generated(llm, ask(reference["requests"]), new),
        "block": cached_block(llm),
        "forced": [row[-new:] for row in own_logprobs(llm, ask(answered))],
    }


def run_generate(llm, reference, ask):
    return {"whole": generated(llm, ask(reference["requests"]), len(reference["tokens"][0]))}


def run_bfloat16(llm, reference, ask):
    found = own_logprobs(llm, ask(reference["bfloat16"]["requests"]))
    return {"logprobs": [logprob for row in found for logprob, _ in row]}


def engines(kind, entry):
    """(name, arguments of the engine, what to run) of each engine of a kind."""
    plain = {**SMALL, "dtype": "float32", **entry.engine}
    over_ranks = {**plain, "tensor_parallel_size": entry.ranks}
    chunked = ("chunked", {**plain, "max_num_batched_tokens": entry.chunk}, run_generate)
    return {
        "one": [("one", plain, run_one), *([] if entry.encodes else [chunked])],
        "tp": [("tp", over_ranks, run_generate)],
        "pp": [("pp", {**plain, "pipeline_parallel_size": 2}, run_generate)],
        "ep": [("ep", {**over_ranks, "enable_expert_parallel": True}, run_generate)],
        "bfloat16": [("bfloat16", {**plain, "dtype": "bfloat16"}, run_bfloat16)],
    }[kind]


def outcome(folder, task, arguments, run, reference):
    """What one engine said, or why there was none."""
    from pydantic import ValidationError
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"model": str(folder), "skip_tokenizer_init": True, **arguments}
    try:
        EngineArgs(**arguments).create_engine_config()
    except ValidationError as error:
        return {"refused": " ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())}
    except (ValueError, NotImplementedError) as error:
        return {"refused": str(error)}
    try:
        llm = LLM(**arguments)
        said = run(llm, reference, partial(asked, folder=folder, task=task))
        llm.llm_engine.engine_core.shutdown()
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    del llm
    gc.collect()
    gc.freeze()  # as engine_server.py does; an engine's shutdown undoes it
    return said


def main(name, folder, kind):
    from vllm.model_executor.models import registry

    from zoo import ENTRIES

    # vLLM looks at a model's class in a process of its own, which imports everything anew, in order not to initialise a device here.
    registry._run_in_subprocess = lambda look: look()
    folder = Path(folder)
    reference = json.loads((folder / "reference.json").read_text())
    found = {}
    for engine, arguments, run in engines(kind, ENTRIES[name]):
        found[engine] = outcome(folder, ENTRIES[name].task, arguments, run, reference)
        written = folder / f"{kind}.json.new"
        written.write_text(json.dumps(found))
        os.replace(written, folder / f"{kind}.json")
