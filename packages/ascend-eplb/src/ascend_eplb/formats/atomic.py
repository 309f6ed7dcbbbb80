# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a reader sees the old file or the new one, never a part."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path` and put it in place in one step.

    A link is followed. An existing file keeps its mode; the mode of a new one follows from the umask.

    Complexity: O(size of the content).

    Raises:
        OSError: the folder is missing or not writable, or `path` is no regular file; names `path`. No temporary
            file is left and an existing file is unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if target.is_symlink():  # what no path can be followed to the end of
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        mode = target.stat().st_mode & 0o777 if target.exists() else None
        if mode is not None and not target.is_file():
            raise OSError(errno.EINVAL, "Not a regular file")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                temporary.chmod(mode)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink()
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
