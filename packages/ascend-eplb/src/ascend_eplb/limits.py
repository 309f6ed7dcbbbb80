# SPDX-License-Identifier: Apache-2.0
"""The largest sizes that are accepted, so that a mistyped number is an error at once and not an exhausted memory."""

from __future__ import annotations

__all__ = ["MOST_BYTES", "MOST_HELD", "MOST_LAYER_ID", "MOST_LOADS", "MOST_SLOTS", "check_limit"]

# Layers x slots: 256 layers of 16384 slots, ten times what 94 layers over 4096 ranks need. 16 MiB as int32.
MOST_SLOTS = 1 << 22
# Layers x ranks x experts, the size of the tables of policies and transfers: 1 GiB as bool, 4 GiB as float32.
MOST_HELD = 1 << 30
# Steps x layers x experts: 1000 steps of 256 layers of 1024 experts. 2 GiB as float64.
MOST_LOADS = 1 << 28
# A file, and the content of an archive: twice the bytes of the greatest load.
MOST_BYTES = 1 << 32
MOST_LAYER_ID = (1 << 31) - 1  # layer numbers are written as int32


def check_limit(what: str, count: int, most: int, unit: str) -> None:
    """Refuse a size above its limit.

    Args:
        what: the arguments that make up the size, with their values.
        count: the size.
        most: its limit, one of this module.
        unit: what is counted.

    Raises:
        ValueError: `count` is above `most`.
    """
    if count > most:
        raise ValueError(f"{what}: {count} {unit} are more than the {most} allowed")
