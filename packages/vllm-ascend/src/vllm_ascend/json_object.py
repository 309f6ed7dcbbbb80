# SPDX-License-Identifier: Apache-2.0
"""Reading one JSON object that a user or a checkpoint gives. No vLLM."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_object"]


def parse_object(content: bytes | str, name: str) -> dict[str, Any]:
    """The object in `content`.

    Args:
        content: JSON, in bytes as UTF-8.
        name: what it is, for messages: a path, or an option.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply to be read, or something else than one object.
    """
    try:
        found = json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be read as JSON") from None
    except ValueError as error:  # also for a number of more digits than Python reads
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be one JSON object, got {'null' if found is None else type(found).__name__}")
    return found
