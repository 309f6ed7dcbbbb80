# SPDX-License-Identifier: Apache-2.0
"""Pictures a second of a small random Qwen2-VL (float32) through vLLM on the simulated NPU, beside Hugging Face transformers.

python benchmarks/vision/run.py [--markdown FILE]     (nox -s bench runs it)

Each request has one picture of its own, a short text, and one token to say: what is measured is the processor, the tower and a prompt. Speeds of a simulation on this
host's CPU; they say nothing about an NPU. vLLM's CPU build is not here: its index has no torchvision for that torch, which the model needs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "packages" / "vllm-ascend" / "tests")]

from measured import result_of  # noqa: E402  (of benchmarks/)

PICTURES, REPEATS = 32, 3
SIDES = (168, 140)
PROMPT = "<|vision_start|><|image_pad|><|vision_end|> w100 w101 w102"
VISION = {"depth": 8, "embed_dim": 320, "hidden_size": 256, "num_heads": 4, "mlp_ratio": 4}


def make(folder):
    """The checkpoint: the zoo's Qwen2-VL with a larger tower."""
    from dataclasses import replace

    from zoo import ENTRIES, reference

    entry = ENTRIES["Qwen2VL"]

    def larger():
        processor, sizes = entry.make()
        return processor, {**sizes, "vision_config": VISION}

    reference.checkpoint(replace(entry, make=larger), folder)


def pictures(first):
    """Random ones, other ones for each `first`, so that no cache has them."""
    import numpy as np
    from PIL import Image

    dice = np.random.default_rng(first)
    return [Image.fromarray(dice.integers(0, 256, (*SIDES, 3), dtype=np.uint8)) for _ in range(PICTURES)]


def vllm(folder):
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=PICTURES, max_num_batched_tokens=2048,
        kv_cache_memory_bytes=128 << 20, enable_prefix_caching=False, limit_mm_per_prompt={"image": 1, "video": 0},
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def answer(images):
        requests = [{"prompt": PROMPT, "multi_modal_data": {"image": image}} for image in images]
        return [output.outputs[0].token_ids[0] for output in llm.generate(requests, sampling, use_tqdm=False)]

    return answer


def transformers(folder):
    import torch
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(images):
        given = processor(text=[PROMPT] * len(images), images=images, return_tensors="pt")
        with torch.inference_mode():
            return model(**given).logits[:, -1].argmax(-1).tolist()

    return answer


def measure(system, folder):
    """Best of some repeats after a warm-up, and the tokens of the last one."""
    answer = {"vllm": vllm, "transformers": transformers}[system](folder)
    answer(pictures(0))
    best = float("inf")
    for repeat in range(1, REPEATS + 1):
        images = pictures(repeat)
        begun = time.perf_counter()
        tokens = answer(images)
        best = min(best, time.perf_counter() - begun)
    print("RESULT " + json.dumps({"rate": PICTURES / best, "tokens": tokens}), flush=True)


def run(system, folder):
    """Its result, from a process of its own."""
    env = {
        "ASCEND_SIM_STRICT": "0", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }  # fmt: skip
    found = result_of([sys.executable, __file__, "--system", system, "--model", folder], **env)
    if "error" in found:
        raise RuntimeError(f"{system}: {found['error']}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--system", choices=("vllm", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.system:
        return measure(options.system, options.model)
    from rich.console import Console
    from rich.table import Table

    console = Console(record=True, width=100)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        names = {"Hugging Face transformers": "transformers", "vLLM on the simulated NPU": "vllm"}
        results = {name: run(system, folder) for name, system in names.items()}
    peer = results["Hugging Face transformers"]
    table = Table(
        "system",
        "pictures/s",
        "tokens equal",
        title="a random Qwen2-VL with a tower of 8 layers, float32, 32 pictures at once",
    )
    for name, result in results.items():
        equal = sum(a == b for a, b in zip(result["tokens"], peer["tokens"], strict=True))
        table.add_row(name, f"{result['rate']:.1f} ({result['rate'] / peer['rate']:.2f}x)", f"{equal} of {PICTURES}")
    console.print(table)
    if options.markdown:
        note = "<!-- nox -s bench, or python benchmarks/vision/run.py --markdown FILE; a host's CPU, not a speed of hardware -->"
        options.markdown.write_text(f"{note}\n```\n{console.export_text()}```\n")


if __name__ == "__main__":
    main()
