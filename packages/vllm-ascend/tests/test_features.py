# SPDX-License-Identifier: Apache-2.0
"""The page about features, and how its cells are judged. `nox -s features` runs the engines."""

import json
from pathlib import Path

import pytest
from features import page, verdict
from features.table import CELLS, FEATURES, PLAIN, digest, engine, kind_of_model

DOCS = Path(__file__).parents[3] / "docs"
RESULTS = json.loads((DOCS / "features.json").read_text())


def test_the_page_is_what_the_results_say():
    assert (DOCS / "features.md").read_text() == page.render(RESULTS)


def test_results_are_of_the_cells_in_their_present_form():
    stale = [name for name, result in RESULTS["cells"].items() if result["digest"] != digest(CELLS[name])]
    assert stale == [], "run `nox -s features -- NAME ...` with these"


def test_nothing_is_wrong_and_nothing_crashes():
    assert [name for name, result in RESULTS["cells"].items() if not verdict.is_good(result["cell"])] == []


def test_each_pair_has_one_cell():
    count = len(FEATURES)
    assert len(CELLS) == count + count * (count - 1) // 2 - 1  # W8A8 and W4A16
    assert all(set(names) <= set(FEATURES) for names in CELLS.values())


def test_a_cell_has_the_options_of_both():
    both = engine(("chunked prefill", "multimodal"))
    assert both["max_num_batched_tokens"] < 40
    assert both["enable_chunked_prefill"]
    assert both["limit_mm_per_prompt"] == {"image": 3}
    assert engine(("EP", "LoRA"))["tensor_parallel_size"] == 2
    assert "tensor_parallel_size" not in engine(("EP", "DP"))
    assert "tensor_parallel_size" not in PLAIN
    assert kind_of_model(("W8A8", "EPLB")) == "experts, int8"
    assert kind_of_model(("TP", "LoRA")) == "dense"


def result(**changes):
    one = {"said": [[1, 2], [3, 4]], "cached": 0, "refused": []}
    again = one | {"cached": 128}
    return {
        "rounds": [one, again],
        "accepted": 3,
        "from_host": 128,
        "replays": 5,
        "moved": {"moves": 4, "failures": 0},
    } | changes


WANTED = {"tokens": [[1, 2], [3, 4]]}


def judged(*names, printed="", wanted=WANTED, **changes):
    return verdict.of_runs(names, [result(**changes)], [wanted], printed)[0]


@pytest.mark.parametrize("name", ["speculation", "prefix cache", "graphs", "EPLB", "KV transfer", "KV offload", "TP"])
def test_a_cell_works_that_says_the_tokens_and_shows_its_feature(name):
    assert judged(name) == "works"
    unseen = {
        "rounds": [result()["rounds"][0]] * 2,
        "accepted": 0,
        "from_host": 0,
        "replays": 0,
        "moved": {"moves": 0, "failures": 0},
    }
    assert judged(name, **unseen) == ("works" if name == "TP" else "wrong")


def test_what_differs_is_wrong():
    assert judged("TP", wanted={"tokens": [[1, 2], [3, 5]]}) == "wrong"
    refused = [result()["rounds"][0] | {"refused": ["no sleep"]}]
    assert judged("sleep", rounds=refused) == "crash"
    vectors = {"vectors": [[1.0, 2.0], [3.0, 4.0]], "bound": 0.1}
    assert judged("pooling", wanted=vectors) == "works"
    assert judged("pooling", wanted=vectors | {"vectors": [[1.0, 2.0], [3.0, 4.2]]}) == "wrong"


def test_why_steps_are_not_captured_is_quoted():
    line = "LoRA adapters (enable_lora) are not captured in graphs by vllm-ascend; every step runs operator by operator (NONE)"
    printed = f"WARNING 11-27 17:00:00 [platform.py:129] {line}\nmore"
    assert verdict.of_runs(("graphs", "LoRA"), [result(replays=0)], [WANTED], printed) == ["eager", line]


def test_what_a_run_raised_is_said():
    printed = "[rank0]: ValueError: the reason\nRuntimeError: Engine core initialization failed. See root cause above."
    assert verdict.of_crash(printed) == ["crash", "ValueError: the reason"]
    assert verdict.of_refusal("x (/a/b) must\nbe 1", "/a/b") == ["refused", "x (MODEL) must be 1"]
