# SPDX-License-Identifier: Apache-2.0
"""Findings: sentences that each name one thing that is wrong with a configuration. All of them become one error. No vLLM.

A check yields its findings instead of raising the first, so that a user mends a command line once and not once for each fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from reprlib import Repr

__all__ = ["ConfigurationError", "found_by", "refuse", "shown"]

_SHORT = Repr()  # its sizes are no arguments before Python 3.12
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 4, 12, 12
_SHORT.maxstring = _SHORT.maxother = 200


class ConfigurationError(ValueError):
    """Everything that is wrong with a configuration: one finding a line, or the only one as it is.

    Args:
        findings: one or more, of which equal ones count once.
    """

    def __init__(self, findings: Iterable[str]) -> None:
        """Number the findings."""
        self.findings = tuple(dict.fromkeys(findings))
        lines = [f"{number}. {finding}" for number, finding in enumerate(self.findings, 1)]
        head = f"{len(lines)} things are wrong with this configuration:"
        super().__init__(self.findings[0] if len(lines) == 1 else "\n".join([head, *lines]))

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[tuple[str, ...]]]:
        """For the way between processes: the findings, not the message, are its argument."""
        return type(self), (self.findings,)


def refuse(findings: Iterable[str]) -> None:
    """Raise ConfigurationError if there are any findings."""
    if found := tuple(findings):
        raise ConfigurationError(found)


def found_by(check: Callable[[], object]) -> list[str]:
    """The findings of the ValueError that `check` raises; empty where it raises none."""
    try:
        check()
    except ConfigurationError as error:
        return list(error.findings)
    except ValueError as error:
        return [str(error)]
    return []


def shown(value: object) -> str:
    """`repr` of a value that a user gave, of bounded length and depth."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a very long {type(value).__name__}"
