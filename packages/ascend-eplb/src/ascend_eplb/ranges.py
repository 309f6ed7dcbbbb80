# SPDX-License-Identifier: Apache-2.0
"""Whole numbers as text: "3-60" or "0-2, 5"."""

from __future__ import annotations

from collections.abc import Iterable

from ascend_eplb.limits import MOST_SLOTS, check_limit

__all__ = ["as_ranges", "parse_ranges"]

_MOST_SHOWN = 12


def as_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text; of more than 12 ranges the middle ones are left out. O(numbers)."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [f"{first}-{last}" if last > first else f"{first}" for first, last in ranges]
    return ", ".join(words if len(words) <= _MOST_SHOWN else [*words[: _MOST_SHOWN - 2], "...", words[-1]])


def parse_ranges(text: str) -> tuple[int, ...]:
    """The numbers, ascending and without repetition, of a text such as "3-60" or "1, 3, 5-7".

    Raises:
        ValueError: no such text, or more numbers than a placement may have slots.
    """
    numbers: set[int] = set()
    for word in text.split(","):
        first, _, last = word.partition("-")
        try:
            low = int(first)
            high = int(last) if last else low
        except ValueError as error:
            raise ValueError(f"{text[:40]!r} must be whole numbers and ranges of them, as 3-60 or 1,3,5") from error
        if not 0 <= low <= high or (not last and "-" in word):
            raise ValueError(f"{text[:40]!r} must be whole numbers and ranges of them, as 3-60 or 1,3,5")
        check_limit(repr(text[:40]), len(numbers) + high - low + 1, MOST_SLOTS, "numbers")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))
