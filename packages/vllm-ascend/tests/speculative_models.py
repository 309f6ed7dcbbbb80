# SPDX-License-Identifier: Apache-2.0
"""Drafts for tests."""

import json
import shutil

__all__ = ["first_layers"]


def first_layers(folder, target, count):
    """The first layers of a checkpoint, with its embedding and its head, as a checkpoint in `target`."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    weights = load_file(folder / "model.safetensors")
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < count
    }
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target
