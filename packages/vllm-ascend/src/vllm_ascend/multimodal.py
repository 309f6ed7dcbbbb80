# SPDX-License-Identifier: Apache-2.0
"""The libraries that multimodal models need beside vLLM's own requirements: the extra `multimodal`."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_ascend.installed import installed

__all__ = ["PARTS", "REMEDY", "missing", "what_is_missing"]

# What they are for -> the distributions that it takes. vLLM itself requires pillow for images and opencv for the frames of videos.
PARTS: Mapping[str, tuple[str, ...]] = {
    "images and video": ("torchvision",),
    "audio": ("av", "scipy", "soundfile", "soxr"),
}
REMEDY = "in a clone of the repository, `uv pip install './packages/vllm-ascend[multimodal]'` brings them"


def missing() -> dict[str, list[str]]:
    """Of each part the distributions that are not installed; a part that is whole is left out."""
    absent = {part: [name for name in names if installed(name) is None] for part, names in PARTS.items()}
    return {part: names for part, names in absent.items() if names}


def what_is_missing() -> str | None:
    """One clause with the remedy, or None where everything is installed."""
    absent = missing()
    if not absent:
        return None
    parts = "; ".join(f"for {part}: {', '.join(names)}" for part, names in absent.items())
    return f"libraries of multimodal models are not installed ({parts}); {REMEDY}"
