# SPDX-License-Identifier: Apache-2.0
"""`InvalidValueError`: a field that breaks a rule, with the field, its value and the rule apart. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["InvalidValueError"]


class InvalidValueError(ValueError):
    """A field whose value breaks a rule.

    Its text names fields as the library does. A program that has other names for them calls `renamed`, and so never edits a message,
    in which a user's own words may stand.

    Args:
        field: the field's name.
        value: its value.
        rule: what is allowed, as the end of a sentence ("must be at least 1"). It names other fields in braces:
            "must divide {data_parallel}".
        others: name and value of each field that `rule` names.
    """

    def __init__(self, field: str, value: object, rule: str, **others: object) -> None:
        """Store the parts and phrase them."""
        self.field = field
        self.value = value
        self.rule = rule
        self.others: Mapping[str, object] = others
        super().__init__(f"{field}={value!r}: {self._filled(lambda name, other: f'{name}={other!r}')}")

    @property
    def fields(self) -> frozenset[str]:
        """The field and all others that the rule names."""
        return frozenset({self.field, *self.others})

    def phrased(self) -> str:
        """The error as one sentence about an option: "option 'size' (3) must divide total (8)"."""
        return f"option {self.field!r} ({self.value!r}) {self._filled(lambda name, other: f'{name} ({other!r})')}"

    def renamed(self, names: Mapping[str, str]) -> InvalidValueError:
        """The same error for a caller that has other names for fields: `names` maps the library's names to the caller's."""

        def new(name: str) -> str:
            return names.get(name, name)

        rule = self._filled(lambda name, other: f"{{{new(name)}}}")
        others = {new(name): other for name, other in self.others.items()}
        return InvalidValueError(new(self.field), self.value, rule, **others)

    def __reduce__(self) -> tuple[Any, ...]:
        """For the way between processes: all parts, where an exception by itself would send its text alone."""
        return _restored, (self.field, self.value, self.rule, dict(self.others))

    def _filled(self, shown: Callable[[str, object], str]) -> str:
        """The rule, with `shown(name, value)` in the place of each field in braces."""
        return re.sub(r"\{([\w.]+)\}", lambda found: shown(found[1], self.others[found[1]]), self.rule)


def _restored(field: str, value: object, rule: str, others: dict[str, object]) -> InvalidValueError:
    return InvalidValueError(field, value, rule, **others)
