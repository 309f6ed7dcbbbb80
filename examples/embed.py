# SPDX-License-Identifier: Apache-2.0
"""Embed sentences through vLLM on an Ascend NPU, real or simulated, and print how near each is to each in meaning.

python examples/embed.py MODEL_FOLDER "TEXT" "TEXT" ...
"""

import logging
import os
import sys
import time

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process starts sooner
# vLLM leaves one host thread to a worker; on a simulated NPU the host is the device.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from vllm import LLM

console = Console(highlight=False)
LONGEST = 40  # characters of a text in the table


def similarity_table(texts: list[str], vectors: list[list[float]]) -> Table:
    """Cosines between texts; the vectors have length 1."""
    table = Table("", *(str(number) for number in range(1, len(texts) + 1)), box=None)
    for number, (text, vector) in enumerate(zip(texts, vectors, strict=True), 1):
        short = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        cosines = [sum(a * b for a, b in zip(vector, other, strict=True)) for other in vectors]
        table.add_row(
            f"{number} {escape(short)}", *(f"[bold]{x:.2f}[/]" if 0.5 <= x < 0.995 else f"{x:.2f}" for x in cosines)
        )
    return table


def main(model: str, texts: list[str]) -> None:
    """Start the engine, embed, say what ran where and how fast."""
    begin = time.perf_counter()
    with console.status("starting vLLM ..."):
        engine = LLM(model, runner="pooling", disable_log_stats=True)
    ready, start = time.perf_counter() - begin, time.perf_counter()
    outputs = engine.embed(texts, use_tqdm=False)
    seconds = time.perf_counter() - start
    config = engine.llm_engine.vllm_config
    engine.llm_engine.engine_core.shutdown()
    console.print(similarity_table(texts, [output.outputs.embedding for output in outputs]))
    simulated = (
        "simulated " if "ascend_sim.loader" in sys.modules and sys.modules["ascend_sim.loader"].decide().active else ""
    )
    console.print(
        f"[dim]{os.path.basename(os.path.normpath(model))} ({str(config.model_config.dtype).removeprefix('torch.')}) on 1 {simulated}NPU; engine start "
        f"{ready:.1f} s; {len(texts)} texts in {seconds * 1000:.0f} ms[/dim]"
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2:])
