# SPDX-License-Identifier: Apache-2.0
"""The documented rules of torch_npu's operators, as data: one TOML file an operator in this folder.

Strict mode enforces exactly the rules whose verdict is "enforced", and its errors begin with the rule's id. `docs/kernels.md` shows
all of them; `python -m ascend_sim.contracts docs/kernels.md` writes that page anew.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["ABOUT", "CHIPS", "FOLDER", "VERDICTS", "Contract", "KernelRule", "Source", "contract", "contracts", "rules"]

FOLDER = Path(__file__).parent
ABOUT = ("dtype", "rank", "shape", "range", "alignment", "layout", "contiguity", "chip", "combination")
VERDICTS = ("enforced", "departed from", "cannot be shown")
CHIPS = ("A2", "A3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a rule is from: a fragment of the wheel's documentation, a fragment of one of its shape functions, or a production call.

    Args:
        entry: name of the operator's entry in torch_npu/_op_plugin_docs.py.
        meta: name of a function in torch_npu/op_plugin/meta/_meta_registrations.py.
        text: a fragment of that entry or function, as it is written there.
        seen: where it was seen, in words.
    """

    entry: str = ""
    meta: str = ""
    text: str = ""
    seen: str = ""

    def __post_init__(self) -> None:
        """Check that it names one place."""
        if sum(map(bool, (self.entry, self.meta, self.seen))) != 1 or bool(self.text) == bool(self.seen):
            raise ValueError(f"a source is entry and text, meta and text, or seen alone; got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRule:
    """One rule of an operator.

    Args:
        id: "operator.name".
        about: one of `ABOUT`.
        rule: the rule in words.
        verdict: one of `VERDICTS`.
        source: where it is from.
        reason: why it is not enforced.
        chips: the chips that it holds for, some of `CHIPS`.
        allowed, multiple, least, most: the rule's numbers or names, where it has any.
    """

    id: str
    about: str
    rule: str
    verdict: str
    source: Source
    reason: str = ""
    chips: tuple[str, ...] = CHIPS
    allowed: tuple[int | str, ...] = ()
    multiple: int | None = None
    least: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        _one_of("about", self.about, ABOUT)
        _one_of("verdict", self.verdict, VERDICTS)
        for chip in self.chips:
            _one_of("chips", chip, CHIPS)
        if not self.chips:
            raise ValueError("chips must name at least one chip; leave it out where the rule holds for all")
        if not self.rule.strip():
            raise ValueError("rule must say the rule in words")
        if (self.verdict == "enforced") == bool(self.reason):
            raise ValueError("reason must be given where the verdict is not 'enforced', and only there")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least must not exceed most, got {self.least} and {self.most}")

    @property
    def operator(self) -> str:
        """Name of the operator."""
        return self.id.partition(".")[0]

    @property
    def enforced(self) -> bool:
        """Whether the simulator refuses a call that breaks the rule."""
        return self.verdict == "enforced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """The rules of one operator, and the modules of the product that call it."""

    operator: str
    called_by: tuple[str, ...]
    rules: tuple[KernelRule, ...]

    def __post_init__(self) -> None:
        """Check the ids."""
        names = [rule.id for rule in self.rules]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each id must be used once, got {', '.join(repeated)} more often")
        for name in names:
            if not name.startswith(f"{self.operator}.") or not name.partition(".")[2]:
                raise ValueError(f"id must be '{self.operator}.' and a short name, got {name!r}")


def contracts(folder: Path = FOLDER) -> tuple[Contract, ...]:
    """The contracts of all operators, by name. ValueError names the file, the rule and what is wrong."""
    return tuple(_read(path) for path in sorted(folder.glob("*.toml")))


def contract(operator: str, folder: Path = FOLDER) -> Contract:
    """The contract of one operator; ValueError where there is none."""
    path = folder / f"{operator}.toml"
    if not path.is_file():
        known = ", ".join(found.stem for found in sorted(folder.glob("*.toml")))
        raise ValueError(f"operator must be one with a contract ({known}), got {operator!r}")
    return _read(path)


def rules(folder: Path = FOLDER) -> dict[str, KernelRule]:
    """The rules of all operators by id."""
    return {rule.id: rule for one in contracts(folder) for rule in one.rules}


def _read(path: Path) -> Contract:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        _known("the file", data, {"operator", "called_by", "rules"}, {"operator", "rules"})
        operator = _words(data, "operator")
        if operator != path.stem:
            raise ValueError(f"operator must be the name of the file, got {operator!r}")
        found = tuple(_rule(number, table) for number, table in enumerate(data["rules"]))
        return Contract(operator=operator, called_by=_list(data, "called_by"), rules=found)
    except (ValueError, TypeError) as error:  # tomllib's own error is a ValueError
        raise ValueError(f"{path}: {error}") from error


def _rule(number: int, table: Mapping[str, Any]) -> KernelRule:
    name = table.get("id", f"rule {number}")
    try:
        _known(
            "a rule", table, {field.name for field in fields(KernelRule)}, {"id", "about", "rule", "verdict", "source"}
        )
        source = table["source"]
        _known("source", source, {field.name for field in fields(Source)}, set())
        values: dict[str, Any] = {"source": Source(**{key: _words(source, key) for key in source})}
        readers = {"multiple": _number, "least": _number, "most": _number, "chips": _list, "allowed": _list}
        for key in table.keys() - {"source"}:
            values[key] = readers.get(key, _words)(table, key)
        return KernelRule(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _known(what: str, table: Mapping[str, Any], known: set[str], needed: set[str]) -> None:
    if unknown := sorted(set(table) - known):
        raise ValueError(f"{what} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if missing := sorted(needed - set(table)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _words(table: Mapping[str, Any], key: str) -> str:
    value = table[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} must be a string, got {value!r}")
    return value


def _number(table: Mapping[str, Any], key: str) -> int:
    value = table[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{key} must be an integer, got {value!r}")
    return value


def _list(table: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(one, str | int) for one in value):
        raise TypeError(f"{key} must be a list of strings or integers, got {value!r}")
    return tuple(value)
