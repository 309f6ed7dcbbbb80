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
from ascend_eplb.cli import main
from ascend_eplb.cli.render import heat_bar


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    np.save("load.npy", np.random.default_rng(0).lognormal(0, 1, (3, 2, 256)))


def run(capsys, line):
    status = main(line.split())
    done = capsys.readouterr()
    return status, done.out, done.err


def run_json(capsys, line):
    status, out, err = run(capsys, line + " --json")
    assert status == 0, err
    return json.loads(out)


def test_generate_check_and_the_rank_15_example(capsys):
    status, out, _ = run(capsys, "generate --experts 256 --ranks 16 --redundant 16 --layers 2 -o map.json")
    assert status == 0
    assert "272  (16 redundant)" in out
    assert eplb.load_placement("map.json") == eplb.spread(num_experts=256, ranks=16, redundant=16, layers=2)
    status, out, _ = run(capsys, "check map.json")
    assert status == 0
    assert "map.json is valid" in out
    status, out, _ = run(capsys, "show map.json --rank 15")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows[0] == ["16", "0", "271", "0"]
    assert [(int(row[0]), int(row[1])) for row in rows[1:]] == [(slot, 240 + slot) for slot in range(16)]
    assert "256 entries, 17 here, 239 are -1" in out


def test_layouts_and_json(capsys):
    found = run_json(capsys, "generate --experts 8 --ranks 2 --redundant 2 --layout checkpoint -o map.npz")
    sizes = {"layers": 1, "experts": 8, "ranks": 2, "slots_per_rank": 5, "slots": 10, "redundant": 2}
    assert found == {"file": "map.npz", **sizes}
    assert run_json(capsys, "check map.npz")["valid"] is True
    assert run_json(capsys, "show map.npz")["experts"] == [[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]]
    found = run_json(capsys, "show map.npz --rank 1")
    assert found["experts"] == [5, 6, 7, 0, 1]
    assert found["expert_map"] == [3, 4, -1, -1, -1, 0, 1, 2]


def test_plan(capsys):
    found = run_json(capsys, "plan --load load.npy --ranks 32 --slots 288 -o new.json")
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
    again = run_json(capsys, f"plan --load drift.npy --ranks 32 --slots 288 {limited}")
    assert again["policy"] == "incremental"
    moved = eplb.moved_slots(placement, eplb.load_placement("b.json")).sum()
    assert again["moved"] == moved
    assert moved > 0
    assert moved <= 40
    assert again["bytes_moved"] == moved * 44_000_000
    by_node = "--nodes 4 --groups 8 --weighting decayed --from new.json --plot p.png -o c.json"
    status, out, _ = run(capsys, f"plan --load load.npy --ranks 32 --slots 288 {by_node}")
    assert status == 0
    assert "balancedness before" in out
    assert "GB at 44 MB an expert" in out
    with open("p.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_plan_without_a_placement_in_force_compares_with_the_default(capsys):
    status, out, _ = run(capsys, "plan --load load.npy --ranks 32 --slots 288 -o new.json")
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
def test_weightings(capsys, options, load):
    run_json(capsys, f"plan --load load.npy --ranks 32 --slots 288 {options} -o new.json")
    expected = eplb.rebalance(load(np.load("load.npy")), ranks=32, slots=288)
    assert eplb.load_placement("new.json") == expected.placement
    found = run_json(capsys, f"simulate --load load.npy --ranks 32 --slots 288 {options}")
    assert len(found["windows"]) == 2


def test_move_limits_of_each_layer_and_a_target(capsys):
    run_json(capsys, "plan --load load.npy --ranks 32 --slots 288 -o old.json")
    old = eplb.load_placement("old.json")
    np.save("drift.npy", np.load("load.npy") * np.random.default_rng(1).lognormal(0, 0.3, (2, 256)))
    line = "plan --load drift.npy --ranks 32 --slots 288 --from old.json"
    found = run_json(capsys, f"{line} --max-moves-per-layer 7 -o new.json")
    moved = eplb.moved_slots(old, eplb.load_placement("new.json"))
    assert found["policy"] == "incremental"
    assert 0 < moved.max() <= 7
    easy, hard = (
        run_json(capsys, f"{line} --policy incremental --target {target} -o x.json") for target in (0.9, 0.97)
    )
    assert 0.9 <= easy["balancedness"] < hard["balancedness"]
    assert easy["moved"] < hard["moved"]
    assert easy["bytes_moved"] == easy["moved"] * 44_000_000


def test_failed_ranks(capsys):
    np.save("few.npy", np.random.default_rng(0).lognormal(0, 1, (2, 16)))
    run_json(capsys, "generate --experts 16 --ranks 8 --redundant 8 --layers 2 -o old.json")
    line = "plan --load few.npy --ranks 8 --slots 24 --from old.json --failed 6,7 -o new.json"
    found = run_json(capsys, line)
    placement = eplb.load_placement("new.json")
    assert (placement.ranks, placement.slots) == (found["ranks"], found["slots"]) == (6, 18)
    old = eplb.load_placement("old.json")
    kept = set(old.physical_to_logical[0, :6].ravel().tolist())
    assert found["lost"] == 2 * (16 - len(kept)) == 6
    status, out, _ = run(capsys, line)
    assert status == 0
    assert "6 experts whose replicas were all on failed ranks" in out


def test_simulate_under_a_limit_is_incremental(capsys):
    found = run_json(capsys, "simulate --load load.npy --ranks 32 --slots 288 --max-moves 9")
    assert found["policy"] == "incremental"
    assert max(window["moved"] for window in found["windows"]) <= 9
    found = run_json(capsys, "simulate --load load.npy --ranks 32 --slots 288 --max-moves-per-layer 3")
    assert max(window["moved"] for window in found["windows"]) <= 6


def test_a_picture_that_cannot_be_is_found_out_before_the_work(capsys):
    assert run(capsys, "plan --load load.npy --ranks 32 --slots 288 -o x.json --plot no/p.png")[0] == 1
    assert not Path("x.json").exists()
    code = (
        "import sys; sys.modules['matplotlib'] = None; from ascend_eplb.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = "plan --load load.npy --ranks 32 --slots 288 -o x.json --plot p.png"
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: pictures need matplotlib: pip install 'ascend-eplb[plot]'\n"
    assert not Path("x.json").exists()


def test_show_heat(capsys):
    run(capsys, "plan --load load.npy --ranks 32 --slots 288 -o new.json")
    status, out, _ = run(capsys, "show new.json --layer 1 --load load.npy")
    assert status == 0
    assert sum("████████" in line for line in out.splitlines()) == 32
    assert "balancedness 0.99" in out
    found = run_json(capsys, "show new.json --layer 1 --load load.npy")
    load = np.load("load.npy").mean(axis=0)
    placement = eplb.load_placement("new.json")
    assert found["rank_loads"] == pytest.approx(eplb.rank_loads(placement, load)[1])
    assert found["balancedness"] == pytest.approx(eplb.balancedness(placement, load)[1])


def test_heat_bars_grow_and_turn_red():
    bars = [heat_bar(value, 2.0, 1.0) for value in (0.0, 0.5, 1.0, 1.1, 2.0)]
    assert [bar.plain.count("█") for bar in bars] == [0, 7, 14, 15, 28]
    assert [bar.spans[0].style for bar in bars[1:]] == ["green", "green", "yellow", "red"]
    assert heat_bar(0.0, 0.0, 0.0).plain == "·" * 28


def test_plots_of_no_load(capsys):
    np.save("zero.npy", np.zeros((2, 2, 8)))
    assert run(capsys, "plan --load zero.npy --ranks 4 --slots 8 -o o.json --plot a.png")[0] == 0
    assert run(capsys, "simulate --load zero.npy --ranks 4 --slots 8 --plot b.png")[0] == 0
    for name in ("a.png", "b.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")


def test_simulate(capsys):
    found = run_json(capsys, "simulate --load load.npy --ranks 32 --slots 288")
    assert [window["window"] for window in found["windows"]] == [1, 2]
    expected = eplb.simulate(np.load("load.npy"), eplb.Problem(load=np.ones((2, 256)), ranks=32, slots=288))
    assert [w["reached"] for w in found["windows"]] == pytest.approx([score.reached for score in expected])
    status, out, _ = run(capsys, "simulate --load load.npy --ranks 32 --slots 288 --policy incremental --plot s.png")
    assert status == 0
    assert "score on the next" in out
    with open("s.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_convert(capsys):
    run(capsys, "generate --experts 8 --ranks 2 --redundant 2 --layers 3 -o map.json")
    for source, target in (("map.json", "a.npz"), ("a.npz", "b.yaml"), ("b.yaml", "c.json")):
        assert run(capsys, f"convert {source} {target} --ranks 2")[0] == 0
    assert Path("map.json").read_text() == Path("c.json").read_text()
    found = run_json(capsys, "convert map.json d.npz --layers 4")
    assert found["layers"] == 4
    assert eplb.load_placement("d.npz") == eplb.spread(num_experts=8, ranks=2, redundant=2, layers=4)


def write_bad_files():
    Path("folder.json").mkdir()
    Path("empty.json").touch()
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    Path("deep.json").write_text("[" * 100_000)
    Path("deep.yaml").write_text("[" * 5_000)
    Path("date.yaml").write_text("num_slots: 2020-13-45")
    Path("huge.json").write_text('{"load_history": [{"logical_expert_load": [[1' + "0" * 400 + ", 1]]}]}")
    devices = [{"device_id": 0, "device_expert": [0, 1]}, {"device_id": 1, "device_expert": [0, 2**31 - 2]}]
    layer = {"layer_id": 0, "device_count": 2, "device_list": devices}
    Path("absurd.json").write_text(json.dumps({"moe_layer_count": 1, "layer_list": [layer]}))
    np.savez_compressed("whole.npz", phy2log=np.arange(256).reshape(1, 256))
    whole = Path("whole.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[:200])
    Path("damaged.npz").write_bytes(whole[:80] + bytes(40) + whole[120:])
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 99999999), }".ljust(117) + b"\n"
    Path("endless.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + header)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("generate --experts 8 --ranks 3 -o map.json", "do not divide over ranks=3"),
        ("generate --experts 8 --ranks 2 --layout odd -o map.json", "--layout=odd is not one of spread, checkpoint"),
        ("generate --experts 8 --ranks 2 -o nowhere/map.json", "error: nowhere/map.json: No such file or directory"),
        ("generate --experts 8 --ranks 2 -o folder.json", "folder.json: Not a regular file"),
        ("generate --experts 99999999999999 --ranks 1 -o map.json", "Unable to allocate"),
        ("generate --experts 8 --ranks 2", "Missing option"),
        ("generate --experts x --ranks 2 -o map.json", "Invalid value for '--experts'"),
        ("check none.json", "none.json: No such file or directory"),
        ("check broken.json", "broken.json: not JSON"),
        ("check load.npy", "load.npy: physical_to_logical must hold integers, not float64"),
        ("check folder.json", "folder.json: Is a directory"),
        ("check empty.json", "empty.json: not JSON: Expecting value"),
        ("check binary.json", "binary.json: not JSON: "),
        ("check deep.json", "deep.json: not JSON: maximum recursion depth"),
        ("check absurd.json", "$.layer_list[0]: expert 2 and 2147483643 more of 0..2147483646 is on no device"),
        ("check cut.npz", "cut.npz: not a NumPy file of plain arrays"),
        ("check damaged.npz", "damaged.npz: not a NumPy file of plain arrays"),
        ("check objects.npy", "objects.npy: not a NumPy file of plain arrays: Object arrays"),
        ("check endless.npy", "endless.npy: not a NumPy file of plain arrays"),
        ("check deep.yaml --ranks 2", "deep.yaml: not YAML: maximum recursion depth"),
        ("check date.yaml --ranks 2", "date.yaml: not YAML: month must be in 1..12"),
        ("plan --load endless.npy --ranks 2 --slots 4 -o x.json", "endless.npy: not a NumPy file"),
        ("plan --load deep.json --ranks 2 --slots 4 -o x.json", "deep.json: not JSON"),
        ("plan --load huge.json --ranks 2 --slots 4 -o x.json", "huge.json: history must be numbers"),
        ("plan --load load.npy --ranks 32 --slots 288 -o x.json --expert-mb inf", "--expert-mb=inf must be finite"),
        ("plan --load load.npy --ranks 32 --slots 288 -o x.json --plot no/p.png", "error: no/p.png: No such file"),
        ("show good.json --load load.npy", "load has 256 experts, the placement 8"),
        ("check map.txt", "a placement file ends in"),
        ("plan --load load.npy --ranks 32 --slots 288 --failed a -o x.json", "--failed=a must be rank numbers"),
        ("plan --load load.npy --ranks 32 --slots 288 --failed 32 -o x.json", "names rank 32, which is not in 0..31"),
        ("plan --load load.npy --ranks 32 --slots 288 --half-life 0 -o x.json", "--half-life=0.0 must be positive"),
        ("plan --load load.npy --ranks 32 --slots 288 --risk -1 --weighting peak -o x.json", "risk=-1.0 must not be"),
        ("plan --load load.npy --ranks 32 --slots 288 --target 1.5 -o x.json", "target=1.5 must be in (0, 1]"),
        ("plan --load load.npy --ranks 32 --slots 288 --max-moves 3 -o x.json", "needs the previous placement"),
        ("plan --load load.npy --ranks 32 --slots 288 -o x.txt", "x.txt: a placement is written to .json"),
        ("check good.json --experts 9", "expert 8 of 0..8 is on no device"),
        ("check good.json --experts 7", "expert 7 is not in 0..6"),
        ("show good.json --layer 7", "layer_id=7 is not in this placement"),
        ("show good.json --rank 7", "--rank=7 is not in 0..1"),
        ("plan --load load.npy --ranks 32 --slots 287 -o x.json", "slots=287 must be a multiple of ranks=32"),
        ("plan --load nan.npy --ranks 2 --slots 4 -o x.json", "step 0, layer 0, expert 1 is nan"),
        ("plan --load load.npy --ranks 32 --slots 288 --policy best -o x.json", "policy='best' is not one of"),
        ("plan --load load.npy --ranks 32 --slots 288 --weighting odd -o x.json", "--weighting=odd"),
        ("simulate --load load.npy --ranks 32 --slots 288 --window 2", "at least 4 steps, not 3"),
        ("simulate --load load.npy --ranks 32 --slots 288 --window 0", "window=0"),
        ("nonsense", "No such command"),
    ],
)
def test_invalid_input_is_one_line_and_status_1(capsys, line, reason):
    eplb.save_placement(eplb.spread(num_experts=8, ranks=2), "good.json")
    with open("broken.json", "w") as file:
        file.write("{")
    np.save("nan.npy", np.array([[1, np.nan, 1, 1]]))
    write_bad_files()
    status, out, err = run(capsys, line)
    assert status == 1
    assert out == ""
    assert reason in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("check none.json", "none.json: No such file or directory"),
        ("show none.json", "none.json: No such file or directory"),
        ("convert none.json x.npz", "none.json: No such file or directory"),
        ("generate --experts 8 --ranks 2 -o no/x.json", "no/x.json: No such file or directory"),
        ("plan --load load.npy --ranks 0 --slots 8 -o x.json", "ranks=0 must be at least 1"),
        ("simulate --load load.npy --ranks 32 --slots 288 --window 9", "history of at least 18 steps, not 3"),
        ("plan --load load.npy", "Missing option"),
    ],
)
def test_with_json_the_reason_is_json_too(capsys, line, reason):
    status, out, err = run(capsys, line + " --json")
    assert status == 1
    assert reason in json.loads(out)["error"]
    assert reason in err


def run_apart(line, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ascend_eplb", *line.split()],
        capture_output=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_terminal_without_box_characters(capsys):
    run(capsys, "generate --experts 8 --ranks 2 --redundant 2 -o map.json")
    done = run_apart("show map.json --rank 1", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"8 entries, 5 here, 3 are -1" in done.stdout


def test_a_terminal_sees_progress():
    np.save("few.npy", np.random.default_rng(0).lognormal(0, 1, (30, 2, 16)))
    done = run_apart("simulate --load few.npy --ranks 8 --slots 24 --json", FORCE_COLOR="1", TERM="xterm")
    assert b"replaying" in done.stderr
    assert len(json.loads(done.stdout)["windows"]) == 29
    done = run_apart("plan --load few.npy --ranks 8 --slots 24 -o x.json --json", FORCE_COLOR="1", TERM="xterm")
    assert b"placing experts" in done.stderr
    assert json.loads(done.stdout)["file"] == "x.json"


def test_a_reader_that_stops_early_is_no_error(capsys):
    run(capsys, "generate --experts 2048 --ranks 512 --redundant 1024 -o map.json")
    with subprocess.Popen(
        [sys.executable, "-m", "ascend_eplb", "show", "map.json", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_version():
    assert run_apart("--version").stdout.decode() == f"ascend-eplb {version('ascend-eplb')}\n"


def test_module_and_help():
    done = subprocess.run([sys.executable, "-m", "ascend_eplb", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("generate", "check", "show", "plan", "simulate", "convert"):
        assert command in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from ascend_eplb.cli import main; sys.exit(main(['check', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'ascend-eplb[cli]'" in done.stderr


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
