# SPDX-License-Identifier: Apache-2.0
"""The page `docs/kernels.md`: every rule with its source and verdict, and how many there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ascend_sim.contracts import CHIPS, VERDICTS, Contract, KernelRule

__all__ = ["page"]

HEAD = """# Kernels: what their documentation rules out

Written from `packages/ascend-sim/src/ascend_sim/contracts/*.toml` by `python -m ascend_sim.contracts docs/kernels.md`. Do not edit it by hand.

Every `npu::` operator that this project calls, with the rules that its documentation has (`torch_npu/_op_plugin_docs.py` in the
torch_npu 2.13.0 wheel), the shape functions of the wheel, or production calls. The verdict of each rule:

* **enforced**: the simulated NPU refuses a call that breaks it, and the error begins with the rule's id in brackets. For each one a test makes a call that breaks only this rule, and a call at its edge that passes.
* **departed from**: the simulated NPU accepts such calls, for the reason given.
* **cannot be shown**: a simulator cannot tell.

A2 and A3 are Atlas A2 (`Ascend910B*`) and Atlas A3 (`Ascend910_93*`); where no chip is named, a rule holds for both.
"""


def page(contracts: Sequence[Contract]) -> str:
    """The whole page, Markdown."""
    counted = [*_row("operator", ["called by", "rules", *VERDICTS]), *_row("---", ["---"] * (2 + len(VERDICTS)))]
    for one in contracts:
        counted += _row(f"[`{one.operator}`](#{one.operator})", [_modules(one), *_counts(one.rules)])
    counted += _row("all", ["", *_counts([rule for one in contracts for rule in one.rules])])
    return "\n".join([HEAD, *counted, "", *(line for one in contracts for line in _section(one))])


def _section(one: Contract) -> list[str]:
    lines = (
        [f"## {one.operator}", "", f"Called by {_modules(one)}.", ""] if one.called_by else [f"## {one.operator}", ""]
    )
    lines += [*_row("rule", ["about", "what it says", "verdict", "source"]), *_row("---", ["---"] * 4)]
    for rule in one.rules:
        says = rule.rule + (f" ({_numbers(rule)})" if _numbers(rule) else "")
        chips = "" if rule.chips == CHIPS else f", {' and '.join(rule.chips)} only"
        verdict = rule.verdict + chips + (f": {rule.reason}" if rule.reason else "")
        lines += _row(f"`{rule.id.partition('.')[2]}`", [rule.about, says, verdict, _source(rule)])
    return [*lines, ""]


def _row(first: str, cells: Iterable[str]) -> list[str]:
    return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in (first, *cells)) + " |"]


def _modules(one: Contract) -> str:
    return ", ".join(f"`{module}`" for module in one.called_by)


def _counts(rules: Sequence[KernelRule]) -> list[str]:
    found = Counter(rule.verdict for rule in rules)
    return [str(len(rules)), *(str(found[verdict]) for verdict in VERDICTS)]


def _numbers(rule: KernelRule) -> str:
    parts = []
    if rule.allowed:
        parts.append(", ".join(map(str, rule.allowed)))
    for word, value in (("multiple of", rule.multiple), ("at least", rule.least), ("at most", rule.most)):
        if value is not None:
            parts.append(f"{word} {value}")
    return "; ".join(parts)


def _source(rule: KernelRule) -> str:
    if rule.source.seen:
        return f"seen: {rule.source.seen}"
    if rule.source.meta:
        return f"shape function `{rule.source.meta}`: `{rule.source.text}`"
    entry = "" if rule.source.entry == rule.operator else f" (entry `{rule.source.entry}`)"
    return f"“{rule.source.text}”{entry}"
