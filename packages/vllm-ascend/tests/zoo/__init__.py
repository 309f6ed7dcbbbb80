# SPDX-License-Identifier: Apache-2.0
"""Architectures as tiny checkpoints with random weights, each served here and compared with Hugging Face transformers."""

from zoo.multimodal import MULTIMODAL
from zoo.text import TEXT

ENTRIES = {entry.name: entry for entry in [*TEXT, *MULTIMODAL]}
