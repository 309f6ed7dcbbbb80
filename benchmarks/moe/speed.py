# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of MoE models (float32) through vLLM on the simulated NPU, beside Hugging Face transformers in eager mode.

Run: python benchmarks/moe/speed.py [--models FOLDER] [--markdown FILE]

Two models: SmolLM2-135M made a mixture of 8 experts, top 2, and a small random Qwen3-MoE of 32 experts, top 4. Each system runs in a process
of its own, one after the other. Speeds of a simulation on this host's CPU; they say nothing about an NPU.
"""

import argparse
import os
import sys
from pathlib import Path

from ascend_sim.checkpoints import smollm2, upcycle
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "serving"))

from run import hot_path, measure, write_hot_path  # noqa: E402  (of benchmarks/serving)

BATCHES = ("1", "8")
SYSTEMS = {
    "Hugging Face transformers": "transformers",
    "vLLM on the simulated NPU": "vllm",
    "vLLM on the simulated NPU (eager)": "vllm-eager",
}


def small_qwen3(folder, tokenizer):
    """A random Qwen3-MoE with another model's tokenizer; kept where it is."""
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=49152, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            intermediate_size=512, moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4, norm_topk_prob=True,
            max_position_embeddings=2048, tie_word_embeddings=True,
        )  # fmt: skip
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)  # its config.json comes last
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(os.environ.get("ASCEND_TEST_MODELS", ".cache/models")),
        help="where models are kept",
    )
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--hot-path", type=Path, help="only count a decoding step's operators, and write them here")
    options = parser.parse_args()
    dense = smollm2(options.models / "smollm2")
    models = {
        "SmolLM2, 8 experts, top 2": upcycle(dense, options.models / "smollm2-moe", experts=8, top_k=2),
        "Qwen3-MoE, 32 experts, top 4": small_qwen3(options.models / "qwen3-moe-small", dense),
    }
    console = Console(record=True, width=110)
    if options.hot_path:
        write_hot_path(options.hot_path, {name: str(folder) for name, folder in models.items()}, console)
        return
    table = Table("model", "system", "tokens/s, batch 1", "tokens/s, batch 8", title="float32, 32 tokens, best of 3")
    for model, folder in models.items():
        results = {}
        for name, system in SYSTEMS.items():
            with console.status(f"{model}: {name}"):
                results[name] = measure(sys.executable, system, str(folder))
            if error := results[name].get("error"):
                raise RuntimeError(f"{model}, {name}: {error}")
        peer = results["Hugging Face transformers"]["tokens_per_second"]
        for name, result in results.items():
            rates = result["tokens_per_second"]
            table.add_row(
                model, name, *(f"{rates[batch]:.1f} ({rates[batch] / peer[batch]:.2f}x)" for batch in BATCHES)
            )
        table.add_section()
    console.print(table)
    console.print(hot_path({model: measure(sys.executable, "counts", str(folder)) for model, folder in models.items()}))
    if options.markdown:
        note = "<!-- python benchmarks/moe/speed.py --markdown FILE; a host's CPU, not a speed of hardware -->"
        options.markdown.write_text(f"{note}\n```\n{console.export_text()}```\n")


if __name__ == "__main__":
    main()
