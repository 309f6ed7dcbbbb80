# SPDX-License-Identifier: Apache-2.0
"""One architecture of each kind from the zoo, and the page about all of them. `nox -s models` runs them all."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from zoo import ENTRIES, page, pooling, run, towers, trial, verdict

DOCS = Path(__file__).parents[3] / "docs"
RESULTS = json.loads((DOCS / "models.json").read_text())


@pytest.mark.slow
def test_one_of_each_kind(engine_servers, tmp_path):
    """A dense text model, one with experts, one of images, and one with a recurrent state in some layers."""
    entries = [ENTRIES[name] for name in ("Llama, rope YaRN", "Qwen3Moe", "Qwen2VL", "Qwen3Next, small state")]
    results = {}
    kinds = [kind for kind in trial.KINDS if kind != "pp"]  # of which other tests have some
    run.visit_all(
        entries, tmp_path, engine_servers, lambda entry, visit: results.update({entry.name: visit.result()}), kinds
    )
    assert {name: result["cells"] for name, result in results.items() if not verdict.is_good(result)} == {}
    assert len(results) == 4


@pytest.mark.slow
def test_a_run_that_ends_badly_is_said(engine_servers, tmp_path):
    entry = replace(ENTRIES["Llama"], name="no such entry")
    results = []
    run.visit_all([entry], tmp_path, engine_servers, lambda _, visit: results.append(visit.result()))
    assert {word for word, _ in results[0]["cells"].values()} == {"no reference"}
    assert "ended with status 1: KeyError: 'no such entry'" in results[0]["cells"]["float32"][1]
    assert not verdict.is_good(results[0])


def test_the_page_is_what_the_results_say():
    assert (DOCS / "models.md").read_text() == page.render(RESULTS)


def test_towers_on_torchs_attention_are_those_of_vllm():
    assert towers.callers() == set(towers.TOWERS)


def test_results_are_of_the_architectures_in_their_present_form():
    stale = [name for name, result in RESULTS["models"].items() if result["entry"] != verdict.digest(ENTRIES[name])]
    assert stale == [], "run `nox -s models -- NAME ...` with these"


def test_what_is_not_equal_is_refused_or_explained():
    bad = [
        name for name, result in RESULTS["models"].items() if not verdict.is_good(result) and not ENTRIES[name].known
    ]
    assert bad == []


def test_all_models_that_pool_are_equal_or_refused():
    found = pooling.results()
    assert list(found) == list(pooling.CASES)
    assert [name for name, result in found.items() if not pooling.is_good(result)] == []


@pytest.mark.parametrize(
    ("changed", "good"),
    [
        ({}, True),
        ({"tp": ["refused", "why"]}, True),
        ({"tp": ["failed", "why"]}, False),
        ({"bfloat16": ["off", ""]}, False),
        ({"float32": ["refused", "why"], "tp": ["refused", "why"]}, False),
    ],
    ids=str,
)
def test_what_of_a_model_that_pools_is_good(changed, good):
    cells = {"float32": ["equal", ""], "cache": ["-", ""], "chunked": ["-", ""], "tp": ["equal", ""], "bfloat16": ["as near", ""]}  # fmt: skip
    assert pooling.is_good({"cells": cells | changed}) == good


def test_what_was_raised_is_found():
    of_worker = "(Worker pid=7) ERROR 11-27 02:05:03 [multiproc_executor.py:949]"
    said = f"""
{of_worker} Traceback (most recent call last):
{of_worker} KeyError: 'layers.1.mlp.gate.e_score_correction_bias'
[rank0]: RuntimeError: later
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
[ERROR] 2026-11-27-02:27:38 (PID:9091, Device:-1, RankID:-1) ERR99999 UNKNOWN application exception
"""
    first, *others, last = verdict.raised_in(said)
    assert first == "KeyError: 'layers.1.mlp.gate.e_score_correction_bias'"
    assert others == ["RuntimeError: later"]
    assert last.startswith("Exception: WorkerProc")
    assert verdict.raised_in("Segmentation fault\n\n") == ["Segmentation fault"]
    assert verdict.raised_in("") == []


@pytest.fixture
def folder(tmp_path):
    """What the runs of an entry wrote that is equal in every way."""
    requests = [{"ids": [1, 2]}, {"ids": list(range(130))}]
    tokens = [[5, 6], [7, 8]]
    exact, errors = [-1.0] * 400, [[0.01, 0.02] * 200, [0.02, 0.01] * 200, [0.015] * 400]
    reference = {
        "requests": requests,
        "tokens": tokens,
        "logprobs": [[-1.0, -2.0]] * 2,
        "bfloat16": {"exact": exact, "errors": errors},
    }
    said = {
        "whole": {"tokens": tokens},
        "again": {"tokens": tokens, "cached": [0, 128]},
        "block": 128,
        "forced": [[(-1.0, 1), (-2.0, 1)]] * 2,
        "of_torch": 0,
        "replays": 9,
    }
    runs = {
        "reference": reference, "one": {"one": said, "chunked": said}, "tp": {"tp": said}, "pp": {"pp": said}, "ep": {"ep": said},
        "bfloat16": {"bfloat16": {"logprobs": [-1.01] * 400}},
    }  # fmt: skip
    for name, what in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    return tmp_path


def change(folder, name, edit):
    said = json.loads((folder / f"{name}.json").read_text())
    edit(said)
    (folder / f"{name}.json").write_text(json.dumps(said))


def words(folder, entry, ended=None):
    return {column: word for column, (word, _) in verdict.cells(ENTRIES[entry], folder, ended or {}).items()}


GOOD = {
    "float32": "equal",
    "cache": "equal",
    "chunked": "equal",
    "tp": "equal",
    "pp": "equal",
    "ep": "equal",
    "bfloat16": "as near",
    "graphs": "captured",
    "tower": "-",
}


def test_equal_is_said_of_what_is_equal(folder):
    assert words(folder, "Qwen3Moe") == GOOD
    assert words(folder, "Llama") == GOOD | {"ep": "-"}
    assert words(folder, "Qwen2VL") == GOOD | {"ep": "-", "tower": "kernel"}
    cells = {column: [word, ""] for column, word in words(folder, "Llama").items()}
    assert verdict.is_good({"cells": cells})
    assert verdict.is_good({"cells": cells | {"pp": ["refused", ""]}})
    assert not verdict.is_good({"cells": cells | {"tp": ["refused", ""]}})


@pytest.mark.parametrize(
    ("name", "edit", "changed"),
    [
        (
            "one",
            lambda said: said["one"]["whole"]["tokens"][1].__setitem__(0, 9),
            {"float32": "4 of 4"},
        ),  # decoding alone is wrong
        ("one", lambda said: said["one"]["again"].update(cached=[0, 0]), {"cache": "no hit"}),
        ("one", lambda said: said["one"]["again"]["tokens"][1].__setitem__(0, 9), {"cache": "2 of 4"}),
        ("one", lambda said: said.pop("chunked"), {"chunked": "failed"}),
        ("tp", lambda said: said["tp"]["whole"]["tokens"][0].__setitem__(1, 9), {"tp": "3 of 4"}),
        ("ep", lambda said: said.update(ep={"failed": "RuntimeError: no"}), {"ep": "failed"}),
        ("bfloat16", lambda said: said["bfloat16"].update(logprobs=[-1.5] * 400), {"bfloat16": "off"}),
        ("bfloat16", lambda said: said["bfloat16"].update(logprobs=[float("nan")] * 400), {"bfloat16": "off"}),
    ],
)
def test_what_is_not_equal_is_not_called_so(folder, name, edit, changed):
    change(folder, name, edit)
    found = words(folder, "Qwen3Moe")
    assert found == GOOD | changed
    assert not verdict.is_good({"cells": {column: [word, ""] for column, word in found.items()}})


@pytest.mark.parametrize(("block", "why"), [(0, "vLLM leaves the cache off"), (256, "a block has 256 tokens")])
def test_a_cache_that_cannot_be_hit_is_said(folder, block, why):
    """Beside a recurrent state; with blocks as of all other models it is a fault."""
    change(
        folder, "one", lambda said: said["one"].update(block=block, again={"tokens": [[9, 9]] * 2, "cached": [0, 0]})
    )
    word, reason = verdict.cells(ENTRIES["Qwen3Moe"], folder, {})["cache"]
    assert word == "-"
    assert reason.startswith(why)


def test_a_tower_on_torch_is_said(folder):
    change(folder, "one", lambda said: said["one"].update(of_torch=3))
    assert words(folder, "Qwen2VL")["tower"] == "torch"
    assert words(folder, "Llama")["tower"] == "-"


def test_steps_without_graphs_are_said(folder):
    change(folder, "one", lambda said: said["one"].update(replays=0))
    assert words(folder, "Llama")["graphs"] == "-"


def test_a_step_that_could_not_be_captured_is_said(folder):
    (folder / "one.txt").write_text("begins\nA decoding step of 4 tokens cannot be captured in a graph, and ...: why\n")
    found = words(folder, "Llama")
    assert found["float32"] == found["graphs"] == "not captured"
    assert found["tp"] == "equal"


def test_what_is_refused_on_one_rank_is_refused(folder):
    change(folder, "one", lambda said: said.update(one={"refused": "no kernel"}))
    assert set(words(folder, "Qwen3Moe").values()) == {"refused", "-"}
    assert set(words(folder, "Llama").values()) == {"refused", "-"}


def test_what_was_not_run_is_said(folder):
    found = verdict.cells(ENTRIES["Qwen3Moe"], folder, {}, ["one"])
    assert {column: word for column, (word, _) in found.items()} == GOOD | dict.fromkeys(
        ("tp", "pp", "ep", "bfloat16"), "not run"
    )
    assert page.counts({"a": {"cells": found}}) == {"all": 1, "refused": 0, "partly": 1, "good": 0, "other": 0}


@pytest.mark.parametrize(("of_this_entry", "kept"), [(True, "3 of 4"), (False, "not run")])
def test_kinds_that_are_not_run_again_keep_their_results(folder, of_this_entry, kept):
    entry = ENTRIES["Qwen3Moe"]
    visit = SimpleNamespace(entry=entry, folder=folder, ended={}, kinds=["one"])
    digest = verdict.digest(entry) if of_this_entry else "another"
    earlier = {"entry": digest, "cells": {"float32": ["1 of 4", ""], "tp": ["3 of 4", ""]}}
    cells = run.Visit.result(visit, earlier)["cells"]
    assert cells["float32"] == ["equal", ""]
    assert cells["tp"] == [kept, ""]


def test_the_page_names_reasons(folder):
    change(folder, "tp", lambda said: said.update(tp={"failed": "RuntimeError: a | b\nc"}))
    entry = ENTRIES["Qwen3Moe"]
    result = {"task": "text", "model": entry.model, "entry": "", "cells": verdict.cells(entry, folder, {})}
    said = page.render(
        {"versions": dict.fromkeys(("vllm", "torch", "torch-npu", "transformers"), "1"), "models": {entry.name: result}}
    )
    assert (
        "| Qwen3Moe | Qwen3MoeForCausalLM | text | equal | equal | equal | failed | equal | equal | as near | captured |  |"
        in said
    )
    assert "* **Qwen3Moe**: TP 2: failed, RuntimeError: a \\| b c" in said
    assert (
        "**Of 1, 0 are equal in every way, 0 are in all that was run (`not run` marks the rest), 0 are refused at the start, 1 are neither.**"
        in said
    )
