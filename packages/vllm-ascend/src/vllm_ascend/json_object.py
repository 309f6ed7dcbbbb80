# SPDX-License-Identifier: Apache-2.0
"""Reading one JSON object that a user or a checkpoint gives. No vLLM."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_object"]


class _RepeatedKeyError(Exception):
    """An object has this key twice."""


def parse_object(content: bytes | str, name: str, *, unique: bool = False) -> dict[str, Any]:
    """The object in `content`.

    Args:
        content: JSON, in bytes as UTF-8.
        name: what it is, for messages: a path, or an option.
        unique: whether a key that an object has twice is an error, as it is not in JSON.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply to be read, or something else than one object.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=_without_repetition if unique else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be read as JSON") from None
    except _RepeatedKeyError as error:
        raise ValueError(f"{name} has the key {str(error)[:200]!r} twice") from None
    except ValueError as error:  # also for a number of more digits than Python reads
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be one JSON object, got {'null' if found is None else type(found).__name__}")
    return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found
