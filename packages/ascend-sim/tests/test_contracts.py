# SPDX-License-Identifier: Apache-2.0
"""The rules of operators: every enforced one is refused by its id and passes at its edge, and every source is where the rule says."""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from ascend_sim.build import native_sources, package_folder
from ascend_sim.contracts import contracts, rules
from ascend_sim.contracts.page import page
from contract_cases import all_cases
from rank_processes import run_ranks

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("contract_worker.py")
RULES, CASES = rules(), all_cases()
ENFORCED = {id: rule for id, rule in RULES.items() if rule.enforced}
CHIP = "A3" if os.environ.get("ASCEND_SIM_SOC", "").startswith("Ascend910_93") else "A2"
strict_only = pytest.mark.skipif(not torch.ops.ascend_sim.strict(), reason="ASCEND_SIM_STRICT=0")


def native_ids() -> set[str]:
    """The ids of the checks in the native sources; those that begin with "." belong to several operators."""
    text = "".join(path.read_text() for path in native_sources()[0] + native_sources()[1])
    return set(re.findall(r'\b(?:STRICT|RULE)\(\s*"([\w.-]+)"', text))


@cache
def entries() -> dict[str, str]:
    """The wheel's documentation by entry; an operator may have several texts."""
    found: dict[str, str] = {}
    tree = ast.parse((package_folder("torch_npu") / "_op_plugin_docs.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_add_torch_npu_docstr":
            name, text = (ast.literal_eval(argument) for argument in node.args)
            found[name] = found.get(name, "") + text
    return found


@cache
def shape_functions() -> dict[str, str]:
    """The wheel's shape functions by name, as they are written."""
    text = (package_folder("torch_npu") / "op_plugin" / "meta" / "_meta_registrations.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = found.get(node.name, "") + "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def test_the_enforced_rules_are_those_in_the_native_sources():
    written = native_ids()
    whole, parts = {id for id in written if id[0] != "."}, {id for id in written if id[0] == "."}
    assert not whole - ENFORCED.keys(), "checks without a rule"
    assert not {part for part in parts if not any(id.endswith(part) for id in ENFORCED)}, "checks without a rule"
    assert not {id for id in ENFORCED if id not in whole and id[id.index(".") :] not in parts}, "rules without a check"


def test_every_enforced_rule_has_a_break_and_an_edge():
    assert CASES.keys() == ENFORCED.keys()
    assert all(one.breaks for one in CASES.values())
    assert all(one.edges for one in CASES.values())


def holds_here(id: str) -> bool:
    return id in RULES and CHIP in RULES[id].chips


def edge_is_here(id: str) -> bool:
    """Whether the calls at a rule's edge run on this chip: those of a rule about the chip do where it does not hold."""
    return id in RULES and (CHIP in RULES[id].chips) != (RULES[id].about == "chip")


BREAKS = sorted(id for id, one in CASES.items() if one.break_ranks == 1 and holds_here(id))
EDGES = sorted(id for id, one in CASES.items() if one.edge_ranks == 1 and edge_is_here(id))
BREAKS_BETWEEN = sorted(id for id, one in CASES.items() if one.break_ranks > 1 and holds_here(id))
EDGES_BETWEEN = sorted(id for id, one in CASES.items() if one.edge_ranks > 1 and edge_is_here(id))


def refusal(id: str) -> str:
    """How the message begins that refuses what breaks a rule."""
    return f"[{id}] {RULES[id].operator}"


@strict_only
@pytest.mark.parametrize("id", BREAKS)
def test_a_break_is_refused_by_its_id(id):
    for call in CASES[id].breaks:
        with pytest.raises(RuntimeError, match=f"^{re.escape(refusal(id))}"):
            call()


@strict_only
@pytest.mark.parametrize("id", EDGES)
def test_a_call_at_the_edge_passes(id):
    for call in CASES[id].edges:
        call()


@pytest.fixture(scope="module")
def between_processes(tmp_path_factory) -> dict[int, list[dict]]:
    """What the calls between processes came to, by the number of processes: for each rank `{id: {"breaks": [...], "edges": [...]}}`."""
    found = {}
    for world in sorted({ranks for one in CASES.values() for ranks in (one.break_ranks, one.edge_ranks)} - {1}):
        folder = tmp_path_factory.mktemp(f"world{world}")
        results = [folder / f"{rank}.json" for rank in range(world)]
        run_ranks(
            WORKER, world, lambda rank, results=results: [f"file://{results[rank].parent}/store", str(results[rank])]
        )
        found[world] = [json.loads(result.read_text()) for result in results]
    return found


@strict_only
@pytest.mark.skipif(CHIP == "A3", reason="breaks and edges between processes run on Atlas A2")
def test_breaks_between_processes_are_refused_by_their_ids(between_processes):
    wrong = {}
    for id in BREAKS_BETWEEN:
        for rank, result in enumerate(between_processes[CASES[id].break_ranks]):
            said = result[id]["breaks"]
            assert len(said) == len(CASES[id].breaks)
            if not all(one is not None and one.startswith(refusal(id)) for one in said):
                wrong[f"{id} on rank {rank}"] = said
    assert not wrong


@strict_only
@pytest.mark.skipif(CHIP == "A3", reason="breaks and edges between processes run on Atlas A2")
def test_calls_at_the_edge_between_processes_pass(between_processes):
    wrong = {}
    for id in EDGES_BETWEEN:
        for rank, result in enumerate(between_processes[CASES[id].edge_ranks]):
            said = result[id]["edges"]
            assert len(said) == len(CASES[id].edges)
            if any(said):
                wrong[f"{id} on rank {rank}"] = said
    assert not wrong


@pytest.mark.skipif(CHIP == "A3", reason="this is the other chip")
def test_the_rules_on_the_other_chip():
    """A process has one chip, so breaks and edges are made again in a process of Atlas A3."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "refused or edge_passes", __file__],
        env=os.environ | {"ASCEND_SIM_SOC": "Ascend910_9391"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("id", sorted(RULES))
def test_each_source_is_in_the_installed_wheel(id):
    source = RULES[id].source
    if source.entry:
        assert source.text in entries()[source.entry]
    elif source.meta:
        assert source.text in shape_functions()[source.meta]


def test_called_by_names_the_modules_that_call_the_operator():
    callers: dict[str, set[str]] = {}
    for path in ROOT.glob("packages/*/src/**/*.py"):
        if "ascend-sim" not in path.parts:
            module = ".".join(path.relative_to(ROOT).parts[3:]).removesuffix(".py")
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr.startswith("npu_"):
                    callers.setdefault(node.attr, set()).add(module)
    assert {one.operator: set(one.called_by) for one in contracts() if one.called_by} == callers


def test_the_page_is_current():
    assert (ROOT / "docs" / "kernels.md").read_text() == page(contracts()), (
        "run: python -m ascend_sim.contracts docs/kernels.md"
    )
