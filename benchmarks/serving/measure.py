# SPDX-License-Identifier: Apache-2.0
"""Measure one system in a process of its own: python measure.py SYSTEM MODEL_FOLDER -> one JSON line.

SYSTEM is `vllm` (whatever platform this interpreter's vLLM finds, with its defaults: graphs or compilation), `vllm-eager`, `transformers`,
`operators` (microseconds per simulated operator), or `counts` (operators that a decoding step of 8 requests launches; the same on every machine).
"""

import json
import os
import sys
import time

TOKENS = 32
REPEATS = 3
BATCHES = (1, 8, 32)
PROMPT = "Once upon a time, in a village at the edge of the forest, there lived"


def rate(generate, batch):
    """Best of REPEATS, in generated tokens a second, after one warm-up."""
    generate(batch)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        generate(batch)
        best = min(best, time.perf_counter() - start)
    return batch * TOKENS / best


ENGINE = {
    "dtype": "float32", "max_model_len": 512, "max_num_seqs": max(BATCHES), "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 512 << 20, "enable_prefix_caching": False,
}  # fmt: skip
COPIES = ("aten::copy_", "aten::_to_copy", "aten::clone")


def vllm(model, eager=False):
    start = time.perf_counter()
    from vllm import LLM, SamplingParams

    imported = time.perf_counter()
    llm = LLM(model, enforce_eager=eager, **ENGINE)
    ready = time.perf_counter()

    def generate(batch, tokens=TOKENS):
        sampling = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        llm.generate([PROMPT] * batch, sampling, use_tqdm=False)

    result = {str(batch): rate(generate, batch) for batch in BATCHES}
    launched = launches_of_a_step(generate)
    llm.llm_engine.engine_core.shutdown()
    return {
        "tokens_per_second": result,
        "launches": launched,
        "import_s": imported - start,
        "start_s": ready - imported,
    }


def launches_of_a_step(generate):
    """What the host launches in a decoding step of the largest batch on the simulated NPU, in all and as updates of graphs; None elsewhere."""
    try:
        from ascend_sim import counters
    except ImportError:
        return None

    def launched(tokens):
        before = counters.snapshot()
        generate(BATCHES[-1], tokens)
        after = counters.snapshot()
        return after.launches - before.launches, after.graphs.updates - before.graphs.updates

    return [more - fewer for fewer, more in zip(launched(3), launched(4), strict=True)]


def vllm_eager(model):
    return vllm(model, eager=True)


def counts(model):
    """Of one decoding step of 8 requests: two runs that differ by it. Of an operator that is called a * layers + b times, a calls are a layer's."""
    from ascend_sim.counters import counting
    from vllm import LLM, SamplingParams

    llm = LLM(model, enforce_eager=True, **ENGINE)
    layers = llm.llm_engine.model_config.hf_text_config.num_hidden_layers

    def calls(tokens):
        with counting() as work:
            llm.generate(
                [PROMPT] * 8, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False
            )
        return {name: count.calls for name, count in work.delta.operators.items()}

    shorter, longer = calls(3), calls(4)
    llm.llm_engine.engine_core.shutdown()
    step = {name: count - shorter.get(name, 0) for name, count in longer.items()}
    found = {"layers": layers}
    for what, names in (("operators", step), ("copies", [name for name in COPIES if name in step])):
        found[f"{what}_a_layer"] = sum(step[name] // layers for name in names)
        found[f"{what}_outside"] = sum(step[name] % layers for name in names)
    return found


def transformers(model):
    start = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    imported = time.perf_counter()
    tokenizer, network = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    )
    ready = time.perf_counter()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def generate(batch):
        many = ids.repeat(batch, 1)
        with torch.inference_mode():
            network.generate(
                many,
                attention_mask=torch.ones_like(many),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=0,
            )

    return {
        "tokens_per_second": {str(b): rate(generate, b) for b in BATCHES},
        "import_s": imported - start,
        "start_s": ready - imported,
    }


def operators(_model):
    import torch
    import torch_npu

    x = torch.randn(8, 576, device="npu")
    w = torch.randn(576, device="npu")
    big = torch.randn(1536, 576, device="npu")
    gates = torch.randn(8, 3072, device="npu")
    cases = {
        "add": lambda: x + x,
        "view (unsqueeze)": lambda: x.unsqueeze(0),
        "linear 8x576 @ 576x1536": lambda: torch.nn.functional.linear(x, big),
        "npu_rms_norm": lambda: torch_npu.npu_rms_norm(x, w, 1e-5),
        "npu_add_rms_norm": lambda: torch_npu.npu_add_rms_norm(x, x, w, 1e-5),
        "npu_swiglu": lambda: torch_npu.npu_swiglu(gates),
    }
    result = {}
    for name, run in cases.items():
        for _ in range(200):
            run()
        start = time.perf_counter()
        for _ in range(2000):
            run()
        result[name] = (time.perf_counter() - start) / 2000 * 1e6
    return {"microseconds": result}


if __name__ == "__main__":
    os.environ["ASCEND_SIM_STRICT"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # the same for every system
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    system, folder = sys.argv[1:]
    systems = {
        "vllm": vllm, "vllm-eager": vllm_eager, "transformers": transformers, "operators": operators, "counts": counts,
    }  # fmt: skip
    print("RESULT " + json.dumps(systems[system](folder)), flush=True)
