# SPDX-License-Identifier: Apache-2.0
"""Ask a model one question through vLLM on an Ascend NPU, real or simulated, and stream the answer.

python examples/ask.py MODEL_FOLDER [--image FILE ...] [QUESTION]
"""

import argparse
import asyncio
import logging
import os
import sys
import time

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# vLLM leaves one host thread to a worker; on a simulated NPU the host is the device.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from rich.console import Console
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

console = Console(highlight=False)


def with_pictures(model: str, question: str, files: list[str]) -> dict[str, object]:
    """vLLM's prompt for a question about pictures, in the chat format of the model's own processor."""
    from PIL import Image
    from transformers import AutoProcessor

    content = [*({"type": "image"} for _ in files), {"type": "text", "text": question}]
    text = AutoProcessor.from_pretrained(model).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return {"prompt": text, "multi_modal_data": {"image": [Image.open(file).convert("RGB") for file in files]}}


def without(engine: AsyncLLM, question: str) -> str:
    """The question in the model's chat format."""
    said = [{"role": "user", "content": question}]
    return engine.get_tokenizer().apply_chat_template(said, tokenize=False, add_generation_prompt=True)


async def answer(engine: AsyncLLM, prompt: object, length: int = 128) -> tuple[int, float, float]:
    """Print the answer as it comes; return (tokens, seconds to the first, seconds in all)."""
    sampling = SamplingParams(temperature=0, max_tokens=length, output_kind=RequestOutputKind.DELTA)
    start, first, tokens = time.perf_counter(), 0.0, 0
    async for output in engine.generate(prompt, sampling, request_id="question"):
        first = first or time.perf_counter() - start
        tokens += len(output.outputs[0].token_ids)
        console.print(output.outputs[0].text, end="", markup=False)
    console.print()
    return tokens, first, time.perf_counter() - start


async def main(model: str, question: str, files: list[str]) -> None:
    """Start the engine, ask, say what ran where and how fast."""
    import torch

    begin = time.perf_counter()
    with console.status("starting vLLM ..."):
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model,
                served_model_name="demo",
                max_model_len=2048,
                max_num_seqs=8,
                kv_cache_memory_bytes=256 << 20,
            )
        )
    ready = time.perf_counter() - begin
    try:
        if files and not engine.vllm_config.model_config.is_multimodal_model:
            raise SystemExit(
                f"{model} is a model of text alone: give the folder of one that reads pictures, or leave --image out"
            )
        console.print(f"[bold]{question}[/bold]")
        prompt = with_pictures(model, question, files) if files else without(engine, question)
        tokens, first, seconds = await answer(engine, prompt)
    finally:
        engine.shutdown()
    simulated = (
        "simulated " if "ascend_sim.loader" in sys.modules and sys.modules["ascend_sim.loader"].decide().active else ""
    )
    config = engine.vllm_config.model_config
    console.print(
        f"[dim]{os.path.basename(os.path.normpath(model))} ({str(config.dtype).removeprefix('torch.')}) on 1 {simulated}"
        f"{torch.npu.get_device_name(0)}; engine start {ready:.1f} s; first token {first * 1000:.0f} ms; "
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s"
        + (" on this host's CPU (not a speed of hardware)" if simulated else "")
        + "[/dim]"
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("question", nargs="*", help='default: "Name the capital of France."')
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture that the question is about; may be repeated",
    )
    options = parser.parse_args()
    if absent := [file for file in options.image if not os.path.isfile(file)]:
        parser.error(f"no such file: {', '.join(absent)}")
    default = "What is in this picture?" if options.image else "Name the capital of France."
    asyncio.run(main(options.model, " ".join(options.question) or default, options.image))
