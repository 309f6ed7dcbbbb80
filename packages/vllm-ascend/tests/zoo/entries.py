# SPDX-License-Identifier: Apache-2.0
"""What the zoo holds: one entry an architecture, from which a tiny checkpoint with random weights is made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 512
# Sizes that most configs have under these names. Four layers give a window or a kind of layer every few layers its turn.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One architecture.

    Args:
        name: how it is called here and on the page.
        task: "text", "images", "video", "audio".
        config: its config class in transformers.
        model: its model class there, whose name vLLM reads from the checkpoint.
        sizes: arguments of the config.
        experts: whether it has routed experts, so that expert parallelism applies.
        ranks: ranks of the run with tensor parallelism.
        known: why a result is not equal and whose that is, where it has been found out; a sentence for the page.
        published: the class that published checkpoints name, where transformers' is called otherwise.
        attention: transformers' way to compute attention.
        engine: more arguments of the engine.
        make: for entries with a processor: a function that returns the processor and the config's arguments.
        chunk: tokens of a step of the run with chunks; no fewer than a picture has where pictures are not cut.
        names: how the published checkpoints begin a tensor's name, by how transformers' `save_pretrained` does, where it differs.
        turned_experts: whether published checkpoints have the experts' inputs before their outputs, the other way round than transformers 5.
        encodes: whether an encoder takes the sound apart, and the prompt is the decoder's.
        mark: what stands for a picture, a video or a sound in a prompt.
    """

    name: str
    task: str = "text"
    config: str
    model: str
    sizes: dict[str, Any] = field(default_factory=dict)
    experts: bool = False
    ranks: int = 2
    known: str = ""
    published: str = ""
    attention: str = "eager"
    engine: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], tuple[Any, dict[str, Any]]] | None = None
    encodes: bool = False
    mark: str = ""
    chunk: int = 32
    names: dict[str, str] = field(default_factory=dict)
    turned_experts: bool = False
