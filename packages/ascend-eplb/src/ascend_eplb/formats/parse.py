# SPDX-License-Identifier: Apache-2.0
"""The step from a file to parsed data that all readers share: every fault of a file is a ValueError or an OSError."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ascend_eplb.limits import MOST_BYTES, check_limit

__all__ = ["parse_file"]

Parsed = TypeVar("Parsed")


def parse_file(path: Path, kind: str, parse: Callable[[bytes], Parsed]) -> Parsed:
    """Read a file and return what `parse` makes of its bytes.

    On damaged input the parsers of Python, NumPy and PyYAML raise whatever their inner parts raise: tokenize.TokenError,
    SyntaxError, OverflowError, lzma.LZMAError, RecursionError and more. Here each of them becomes a ValueError. `parse`
    reads and writes no file, so an OSError always comes from reading this one.

    Args:
        path: a regular file.
        kind: the format, for the message "not <kind>: ...".
        parse: from the content of the file to data, without checks of what the data mean.

    Raises:
        OSError: the file cannot be read, or is no regular file (reading a pipe could block for ever).
        ValueError: the file is larger than `MOST_BYTES`, or `parse` failed; says why and what to do, without the path.
    """
    content = _read(path)
    try:
        return parse(content)
    except Exception as error:  # see above: the set of types is open
        raise ValueError(
            f"not {kind}: {_reason(error)}; the file is damaged, cut off or of another format: write it again"
        ) from error


def _read(path: Path) -> bytes:
    info = path.stat()
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    check_limit("the file is too large", info.st_size, MOST_BYTES, "bytes")
    return path.read_bytes()


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
