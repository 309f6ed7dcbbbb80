# SPDX-License-Identifier: Apache-2.0
"""Towers whose classes in vLLM call torch's attention themselves, for the page. `test_zoo.py` compares the table with vLLM's source."""

import ast
from pathlib import Path

CALL = "scaled_dot_product_attention"
BIASES = "learned biases are added to scores"
MASKED = "keys of padding are masked"
# Module of vllm.model_executor.models -> (models, what its attention asks for beside queries, keys and values).
TOWERS = {
    "blip2": ("BLIP-2, Granite 4 Vision, Granite Speech: the Q-Former", "nothing"),
    "deepencoder": ("DeepSeek-OCR, DeepSeek-OCR 2: SAM's encoder", BIASES),
    "granite_speech": ("Granite Speech", BIASES),
    "idefics2_vision_model": ("Aria, MiniCPM-V, Phi-4 Multimodal: pictures of several sizes in one batch; others run on the kernel", MASKED),
    "lilicorr": ("LiLiCorr", BIASES),
    "midashenglm": ("MiDashengLM", MASKED),
    "molmo2": ("Molmo2: the pooling of patches; its tower runs on the kernel", MASKED),
    "moss_audio": ("MOSS-Audio", MASKED),
    "phi4mm_utils": ("Phi-4 Multimodal: sounds", BIASES),
}  # fmt: skip


def callers():
    """The modules that call torch's attention."""
    import vllm

    found = set()
    for file in Path(vllm.__file__).parent.glob("model_executor/models/*.py"):
        text = file.read_text()
        calls = (node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)) if CALL in text else ()
        if any(CALL in (getattr(call, "attr", ""), getattr(call, "id", "")) for call in calls):
            found.add(file.stem)
    return found


def section():
    """Lines of the page."""
    yield from (
        "## Towers",
        "",
        "A tower runs on the NPU's kernel where vLLM has built it with its layer for towers (`MMEncoderAttention`), and where it is transformers' own class, which asks for",
        f"attention by name. These classes of vLLM call torch's `{CALL}` themselves, and vLLM has no layer there that a platform may",
        "replace. No model above makes these calls; on hardware torch_npu chooses how that function runs.",
        "",
        "| module | models | beside queries, keys and values |",
        "|---|---|---|",
        *(f"| `{module}` | {models} | {beside} |" for module, (models, beside) in sorted(TOWERS.items())),
        "",
    )
