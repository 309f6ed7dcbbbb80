# SPDX-License-Identifier: Apache-2.0
"""The folder that a checkpoint is made in: it appears complete or not at all, and says what it was made of."""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "RECIPE_FORMAT",
    "Progress",
    "already_there",
    "check_room",
    "module",
    "new_directory",
    "sha256",
    "silent",
    "write_json",
]

#: Called as ``progress(stage, done, total)``. Stages follow each other; ``done`` rises from 0 to ``total`` in each. The
#: unit of "download" is bytes, that of the other stages is tensors or files.
Progress = Callable[[str, int, int], None]

_MARKER = "ascend-sim.json"  # written last: what the checkpoint was made of, and the size of every file
RECIPE_FORMAT = 1  # raise it when the same source would give other files


def silent(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


def module(name: str) -> Any:
    """Import ``name``, which the extra ``models`` brings.

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        message = f"Making checkpoints needs the package {package}. Install it: pip install 'ascend-sim[models]'"
        raise RuntimeError(message) from error


def already_there(directory: Path, recipe: dict[str, Any]) -> bool:
    """Tell whether ``directory`` is the complete checkpoint of ``recipe`` (True) or free to be written (False).

    Raises:
        FileExistsError: it holds something else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        marker = json.loads((directory / _MARKER).read_text())
        made_of, sizes = marker["recipe"], marker["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        made_of, sizes = None, {}
    if made_of is None:
        found = "files of another origin" if directory.is_dir() else "a file, not a directory"
    elif made_of != recipe:
        wanted = {key: value for key, value in recipe.items() if made_of.get(key) != value}
        found = f"a checkpoint made otherwise ({_MARKER} does not say {json.dumps(wanted)})"
    else:
        damaged = [name for name, size in sizes.items() if _size(directory / name) != size]
        if not damaged:
            return True
        found = f"an incomplete checkpoint ({', '.join(damaged)} missing or of the wrong size)"
    raise FileExistsError(f"{directory} holds {found}. Nothing was written: name another directory, or remove this one")


def _size(file: Path) -> int | None:
    """Size of ``file`` in bytes, None where there is none."""
    return file.stat().st_size if file.is_file() else None


def check_room(directory: Path, size: int) -> None:
    """Raise OSError unless ``size`` bytes are free where ``directory`` shall be."""
    parent = next(folder for folder in directory.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint needs at least {size:,} bytes and {free:,} are free; name a directory with more room",
            str(directory),
        )


@contextlib.contextmanager
def new_directory(directory: Path, recipe: dict[str, Any]) -> Iterator[Path]:
    """Lend a draft folder that becomes ``directory`` when the block ends well, and vanishes when it does not.

    The draft's parent is scratch space on the same file system, removed in either case.
    """
    target = directory.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        draft = Path(scratch) / "checkpoint"
        draft.mkdir()
        yield draft
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        for file in files:
            file.chmod(draft.stat().st_mode & 0o666)  # what the umask allows; safetensors writes for the owner alone
        sizes = {file.relative_to(draft).as_posix(): file.stat().st_size for file in files}
        write_json(draft / _MARKER, {"recipe": recipe, "files": sizes})
        try:
            os.replace(draft, target)
        except OSError as error:
            # Another process may have finished the same checkpoint first; anything else in the way is an error.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) or not already_there(target, recipe):
                raise


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(*files: Path) -> str:
    """SHA-256 of one file's bytes, or of several files' digests in this order."""
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
