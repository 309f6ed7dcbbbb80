# SPDX-License-Identifier: Apache-2.0
import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import ascend_eplb as eplb
from ascend_eplb.cli.render import heat_bar


def test_generate_check_and_the_rank_15_example(run):
    status, out, _ = run("generate --experts 256 --ranks 16 --redundant 16 --layers 2 -o map.json")
    assert status == 0
    assert "272  (16 redundant)" in out
    assert eplb.load_placement("map.json") == eplb.spread(num_experts=256, ranks=16, redundant=16, layers=2)
    status, out, _ = run("check map.json")
    assert status == 0
    assert "map.json is valid" in out
    status, out, _ = run("show map.json --rank 15")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows[0] == ["16", "0", "271", "0"]
    assert [(int(row[0]), int(row[1])) for row in rows[1:]] == [(slot, 240 + slot) for slot in range(16)]
    assert "256 entries, 17 here, 239 are -1" in out


def test_layouts_and_json(run_json):
    found = run_json("generate --experts 8 --ranks 2 --redundant 2 --layout checkpoint -o map.npz")
    sizes = {"layers": 1, "experts": 8, "ranks": 2, "slots_per_rank": 5, "slots": 10, "redundant": 2}
    assert found == {"file": "map.npz", **sizes}
    assert run_json("check map.npz")["valid"] is True
    assert run_json("show map.npz")["experts"] == [[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]]
    found = run_json("show map.npz --rank 1")
    assert found["experts"] == [5, 6, 7, 0, 1]
    assert found["expert_map"] == [3, 4, -1, -1, -1, 0, 1, 2]


def test_plan(run, run_json):
    found = run_json("plan --load load.npy --ranks 32 --slots 288 -o new.json")
    placement = eplb.load_placement("new.json")
    load = eplb.mean_load(eplb.read_loads("load.npy"))
    assert found["balancedness"] == pytest.approx(eplb.balancedness(placement, load).mean())
    assert found["balancedness"] > 0.99
    assert found["bound"] == 1.0
    assert found["before"] == "spread"
    default = eplb.spread(num_experts=256, ranks=32, redundant=32, layers=2)
    assert found["balancedness_before"] == pytest.approx(eplb.balancedness(default, load).mean())
    assert found["moved"] is None
    np.save("drift.npy", load * np.random.default_rng(1).lognormal(0, 0.3, load.shape))
    limited = "--weighting mean --from new.json --max-moves 40 -o b.json"
    again = run_json(f"plan --load drift.npy --ranks 32 --slots 288 {limited}")
    assert again["policy"] == "incremental"
    moved = eplb.moved_slots(placement, eplb.load_placement("b.json")).sum()
    assert again["moved"] == moved
    assert moved > 0
    assert moved <= 40
    assert again["bytes_moved"] == moved * 44_000_000
    by_node = "--nodes 4 --groups 8 --weighting decayed --from new.json --plot p.png -o c.json"
    status, out, _ = run(f"plan --load load.npy --ranks 32 --slots 288 {by_node}")
    assert status == 0
    assert "balancedness before" in out
    assert "GB at 44 MB an expert" in out
    with open("p.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_plan_without_a_placement_in_force_compares_with_the_default(run):
    status, out, _ = run("plan --load load.npy --ranks 32 --slots 288 -o new.json")
    assert status == 0
    assert re.search(r"balancedness before │ 0\.\d+  \(spread\)", out)
    assert "moves" not in out


@pytest.mark.parametrize(
    ("options", "load"),
    [
        ("", lambda history: history.mean(axis=0)),
        ("--weighting decayed", lambda history: eplb.decayed_load(history, 1.0)),
        ("--weighting decayed --half-life 3", lambda history: eplb.decayed_load(history, 3.0)),
        ("--weighting peak", lambda history: history.mean(axis=0) + history.std(axis=0)),
        ("--weighting peak --risk 2.5", lambda history: history.mean(axis=0) + 2.5 * history.std(axis=0)),
    ],
)
def test_weightings(run_json, options, load):
    run_json(f"plan --load load.npy --ranks 32 --slots 288 {options} -o new.json")
    expected = eplb.rebalance(load(np.load("load.npy")), ranks=32, slots=288)
    assert eplb.load_placement("new.json") == expected.placement
    found = run_json(f"simulate --load load.npy --ranks 32 --slots 288 {options}")
    assert len(found["windows"]) == 2


def test_move_limits_of_each_layer_and_a_target(run_json):
    run_json("plan --load load.npy --ranks 32 --slots 288 -o old.json")
    old = eplb.load_placement("old.json")
    np.save("drift.npy", np.load("load.npy") * np.random.default_rng(1).lognormal(0, 0.3, (2, 256)))
    line = "plan --load drift.npy --ranks 32 --slots 288 --from old.json"
    found = run_json(f"{line} --max-moves-per-layer 7 -o new.json")
    moved = eplb.moved_slots(old, eplb.load_placement("new.json"))
    assert found["policy"] == "incremental"
    assert 0 < moved.max() <= 7
    easy, hard = (run_json(f"{line} --policy incremental --target {target} -o x.json") for target in (0.9, 0.97))
    assert 0.9 <= easy["balancedness"] < hard["balancedness"]
    assert easy["moved"] < hard["moved"]
    assert easy["bytes_moved"] == easy["moved"] * 44_000_000


def test_failed_ranks(run, run_json):
    np.save("few.npy", np.random.default_rng(0).lognormal(0, 1, (2, 16)))
    run_json("generate --experts 16 --ranks 8 --redundant 8 --layers 2 -o old.json")
    line = "plan --load few.npy --ranks 8 --slots 24 --from old.json --failed 6,7 -o new.json"
    found = run_json(line)
    placement = eplb.load_placement("new.json")
    assert (placement.ranks, placement.slots) == (found["ranks"], found["slots"]) == (6, 18)
    old = eplb.load_placement("old.json")
    kept = set(old.physical_to_logical[0, :6].ravel().tolist())
    assert found["lost"] == 2 * (16 - len(kept)) == 6
    status, out, _ = run(line)
    assert status == 0
    assert "6 experts whose replicas were all on failed ranks" in out


def test_simulate_under_a_limit_is_incremental(run_json):
    found = run_json("simulate --load load.npy --ranks 32 --slots 288 --max-moves 9")
    assert found["policy"] == "incremental"
    assert max(window["moved"] for window in found["windows"]) <= 9
    found = run_json("simulate --load load.npy --ranks 32 --slots 288 --max-moves-per-layer 3")
    assert max(window["moved"] for window in found["windows"]) <= 6


def test_show_heat(run, run_json):
    run("plan --load load.npy --ranks 32 --slots 288 -o new.json")
    status, out, _ = run("show new.json --layer 1 --load load.npy")
    assert status == 0
    assert sum("████████" in line for line in out.splitlines()) == 32
    assert "balancedness 0.99" in out
    found = run_json("show new.json --layer 1 --load load.npy")
    load = np.load("load.npy").mean(axis=0)
    placement = eplb.load_placement("new.json")
    assert found["rank_loads"] == pytest.approx(eplb.rank_loads(placement, load)[1])
    assert found["balancedness"] == pytest.approx(eplb.balancedness(placement, load)[1])


def test_heat_bars_grow_and_turn_red():
    bars = [heat_bar(value, 2.0, 1.0) for value in (0.0, 0.5, 1.0, 1.1, 2.0)]
    assert [bar.plain.count("█") for bar in bars] == [0, 7, 14, 15, 28]
    assert [bar.spans[0].style for bar in bars[1:]] == ["green", "green", "yellow", "red"]
    assert heat_bar(0.0, 0.0, 0.0).plain == "·" * 28


def test_plots_of_no_load(run):
    np.save("zero.npy", np.zeros((2, 2, 8)))
    assert run("plan --load zero.npy --ranks 4 --slots 8 -o o.json --plot a.png")[0] == 0
    assert run("simulate --load zero.npy --ranks 4 --slots 8 --plot b.png")[0] == 0
    for name in ("a.png", "b.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")


def test_simulate(run, run_json):
    found = run_json("simulate --load load.npy --ranks 32 --slots 288")
    assert [window["window"] for window in found["windows"]] == [1, 2]
    expected = eplb.simulate(np.load("load.npy"), eplb.Problem(load=np.ones((2, 256)), ranks=32, slots=288))
    assert [w["reached"] for w in found["windows"]] == pytest.approx([score.reached for score in expected])
    status, out, _ = run("simulate --load load.npy --ranks 32 --slots 288 --policy incremental --plot s.png")
    assert status == 0
    assert "score on the next" in out
    with open("s.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_convert(run, run_json):
    run("generate --experts 8 --ranks 2 --redundant 2 --layers 3 -o map.json")
    for source, target in (("map.json", "a.npz"), ("a.npz", "b.yaml"), ("b.yaml", "c.json")):
        assert run(f"convert {source} {target} --ranks 2")[0] == 0
    assert Path("map.json").read_text() == Path("c.json").read_text()
    found = run_json("convert map.json d.npz --layers 4")
    assert found["layers"] == 4
    assert eplb.load_placement("d.npz") == eplb.spread(num_experts=8, ranks=2, redundant=2, layers=4)


def test_layers_of_a_model_are_found_in_a_file(run, run_json):
    run("generate --experts 8 --ranks 2 --redundant 2 --layers 58 -o map.json")
    found = run_json("convert map.json map.yaml --moe-layers 3-60")
    assert (found["numbering"], found["lacking"], found["unused"]) == ("position", [], [])
    assert eplb.load_placement("map.yaml", ranks=2).layer_ids == tuple(range(3, 61))
    assert run_json("check map.yaml --ranks 2 --moe-layers 3-60")["numbering"] == "decoder"
    status, out, err = run("check map.yaml --ranks 2 --moe-layers 3-62")
    assert (status, err) == (0, "")
    assert (
        "map.yaml: its layer numbers 3-60 are read as numbers of decoder layers; it lacks decoder layers 61-62" in out
    )


def test_names_that_look_like_markup_are_printed_as_they_are(run):
    Path("a[").mkdir()
    for line, said in (
        ("generate --experts 8 --ranks 2 -o a[/b].json", "wrote a[/b].json"),
        ("check a[/b].json", "a[/b].json is valid"),
        ("plan --load load.npy --ranks 32 --slots 288 -o a[/red].json", "wrote a[/red].json"),
        ("plan --load load.npy --ranks 32 --slots 288 --from a[/red].json -o [red]y.json", "(a[/red].json)"),
    ):
        status, out, err = run(line)
        assert status == 0, err
        assert said in out


def run_apart(line, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ascend_eplb", *line.split()],
        capture_output=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_terminal_without_box_characters(run):
    run("generate --experts 8 --ranks 2 --redundant 2 -o map.json")
    done = run_apart("show map.json --rank 1", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"8 entries, 5 here, 3 are -1" in done.stdout


@pytest.mark.usefixtures("folder")
def test_a_terminal_sees_progress():
    np.save("few.npy", np.random.default_rng(0).lognormal(0, 1, (30, 2, 16)))
    done = run_apart("simulate --load few.npy --ranks 8 --slots 24 --json", FORCE_COLOR="1", TERM="xterm")
    assert b"replaying" in done.stderr
    assert len(json.loads(done.stdout)["windows"]) == 29
    done = run_apart("plan --load few.npy --ranks 8 --slots 24 -o x.json --json", FORCE_COLOR="1", TERM="xterm")
    assert b"placing experts" in done.stderr
    assert json.loads(done.stdout)["file"] == "x.json"


def test_a_reader_that_stops_early_is_no_error(run):
    run("generate --experts 2048 --ranks 512 --redundant 1024 -o map.json")
    with subprocess.Popen(
        [sys.executable, "-m", "ascend_eplb", "show", "map.json", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=1800) == 1


def test_version():
    assert run_apart("--version").stdout.decode() == f"ascend-eplb {version('ascend-eplb')}\n"


def test_module_and_help():
    done = subprocess.run([sys.executable, "-m", "ascend_eplb", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("generate", "check", "show", "plan", "simulate", "convert"):
        assert command in done.stdout


def test_import_needs_numpy_alone():
    code = (
        "import sys, ascend_eplb\n"
        "third = ('torch', 'vllm', 'torch_npu', 'typer', 'rich', 'yaml', 'matplotlib', 'scipy', 'pandas')\n"
        "print([name for name in third if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_public_names():
    for name in eplb.__all__:
        text = getattr(eplb, name).__doc__
        assert text or name == "Policy"
        if inspect.isfunction(getattr(eplb, name)):
            for said in (r"Raises:|[Ee]rrors", r"Complexity|complexity|O\(", r"Source:"):
                assert re.search(said, text), f"the docstring of {name} lacks {said}"
    assert eplb.__all__ == sorted(eplb.__all__)
