# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ascend_eplb as eplb


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
        ("generate --experts 99999999999999 --ranks 1 -o map.json", "are more than the 4194304 allowed"),
        ("generate --experts 8 --ranks 2", "Missing option"),
        ("generate --experts x --ranks 2 -o map.json", "Invalid value for '--experts'"),
        ("check none.json", "none.json: No such file or directory"),
        ("check broken.json", "broken.json: not JSON"),
        ("check load.npy", "load.npy: physical_to_logical must hold integers, not float64"),
        ("check folder.json", "folder.json: Is a directory"),
        ("check empty.json", "empty.json: not JSON: Expecting value"),
        ("check binary.json", "binary.json: not JSON: "),
        ("check deep.json", "deep.json: not JSON: nested too deeply"),
        ("check absurd.json", "$.layer_list[0]: expert 2 and 2147483643 more of 0..2147483646 is on no device"),
        ("check cut.npz", "cut.npz: not a NumPy file of plain arrays"),
        ("check damaged.npz", "damaged.npz: not a NumPy file of plain arrays"),
        ("check objects.npy", "objects.npy: not a NumPy file of plain arrays: Object arrays"),
        ("check endless.npy", "endless.npy: not a NumPy file of plain arrays"),
        ("check deep.yaml --ranks 2", "deep.yaml: not YAML: nested too deeply"),
        ("check date.yaml --ranks 2", "date.yaml: not YAML: month must be in 1..12"),
        ("plan --load endless.npy --ranks 2 --slots 4 -o x.json", "endless.npy: not a NumPy file"),
        ("plan --load deep.json --ranks 2 --slots 4 -o x.json", "deep.json: not JSON"),
        ("plan --load huge.json --ranks 2 --slots 4 -o x.json", "huge.json: history must be numbers"),
        (
            "plan --load load.npy --ranks 32 --slots 288 -o x.json --expert-mb inf",
            "--expert-mb=inf must be from 0 to 1000000",
        ),
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
        ("generate --experts 256 --ranks 16 --layers 2147483648 -o x.json", "layers=2147483648: 549755813888 slots"),
        ("generate --experts 8 --ranks 1000000000000 -o x.json", "ranks=1000000000000, layers=1: "),
        ("generate --experts 8 --ranks 2 --redundant 1000000000000 -o x.json", "redundant=1000000000000, ranks=2, "),
        ("convert good.json x.npz --layers 1000000000", "layers=1000000000: 8000000000 slots over all layers, at 8 a"),
        ("convert good.json x.npz --layers -1", "layers=-1 must be at least one layer"),
        ("convert good.json x.npz --layers 1 --moe-layers 0", "--layers=1 and --moe-layers=0 exclude each other"),
        ("check good.json --moe-layers 7-9,x", "--moe-layers='7-9,x' must be whole numbers and ranges of them"),
        ("check good.json --moe-layers 0-99999999999", "100000000000 numbers are more than the 4194304 allowed"),
        ("check good.json --moe-layers 0-4000000", "4000001 MoE layers: 32000008 slots over all layers, at 8 a layer"),
        ("check layers.json --moe-layers 3-60", "layers.json: its layers 10, 70 are neither among the model's MoE"),
        (
            "plan --load load.npy --ranks 4194304 --slots 4194304 -o x.json",
            "layers=2, ranks=4194304, slots=4194304: 8388608",
        ),
        (
            "plan --load wide.npy --ranks 32768 --slots 65536 -o x.json",
            "experts=65536: 2147483648 layers x ranks x experts",
        ),
        ("simulate --load load.npy --ranks 4194304 --slots 4194304", "layers=2, ranks=4194304, slots=4194304: 8388608"),
        (
            "plan --load load.npy --ranks 32 --slots 288 -o x.json --expert-mb 1e308",
            "--expert-mb=1e+308 must be from 0 to",
        ),
    ],
)
def test_invalid_input_is_one_line_and_status_1(run, line, reason):
    eplb.save_placement(eplb.spread(num_experts=8, ranks=2), "good.json")
    with open("broken.json", "w") as file:
        file.write("{")
    np.save("nan.npy", np.array([[1, np.nan, 1, 1]]))
    np.save("wide.npy", np.ones((1, 65536)))
    eplb.save_placement(eplb.Placement([[[0, 1]], [[1, 0]]], 2, (10, 70)), "layers.json")
    write_bad_files()
    status, out, err = run(line)
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
def test_with_json_the_reason_is_json_too(run, line, reason):
    status, out, err = run(line + " --json")
    assert status == 1
    assert reason in json.loads(out)["error"]
    assert reason in err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from ascend_eplb.cli import main; sys.exit(main(['check', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'ascend-eplb[cli]'" in done.stderr


def test_a_picture_that_cannot_be_is_found_out_before_the_work(run):
    assert run("plan --load load.npy --ranks 32 --slots 288 -o x.json --plot no/p.png")[0] == 1
    assert not Path("x.json").exists()
    code = (
        "import sys; sys.modules['matplotlib'] = None; from ascend_eplb.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = "plan --load load.npy --ranks 32 --slots 288 -o x.json --plot p.png"
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: pictures need matplotlib: pip install 'ascend-eplb[plot]'\n"
    assert not Path("x.json").exists()


LONG = "x" * 300
PLACEMENTS = ("check {}", "show {}", "convert {} out.npz", "plan --load load.npy --ranks 32 --slots 288 --from {} -o out.npz",
              "simulate --load load.npy --ranks 32 --slots 288 --from {}")  # fmt: skip
LOADS = (
    "plan --load {} --ranks 32 --slots 288 -o out.npz",
    "simulate --load {} --ranks 32 --slots 288",
    "show good.json --load {}",
)
INPUTS = ("none.json", "no/map.json", "folder.json", "pipe.json", "empty.json", "binary.json", "null.json", "list.json", "text.json",
          "good.json/map.json", "map.txt", "map", "empty.npz", "binary.npy", "deep.json", "loop.json", f"{LONG}.json")  # fmt: skip


@pytest.mark.parametrize("line", [*PLACEMENTS, *LOADS])
def test_an_input_that_is_none_is_named_in_one_line(run, line):
    write_bad_files()
    eplb.save_placement(eplb.spread(num_experts=8, ranks=2), "good.json")
    os.mkfifo("pipe.json")
    Path("loop.json").symlink_to("loop.json")
    for name, content in {
        "null.json": "null",
        "list.json": "[]",
        "text.json": '"map"',
        "map.txt": "",
        "map": "",
    }.items():
        Path(name).write_text(content)
    Path("empty.npz").touch()
    Path("binary.npy").write_bytes(bytes(range(256)))
    for name in INPUTS:
        status, out, err = run(line.format(name))
        assert status == 1, name
        assert err.startswith(f"error: {name}: "), err
        assert err.count("\n") == 1, err
        assert out == ""
        assert not Path("out.npz").exists()


WRITES = (
    "generate --experts 8 --ranks 2 -o {}",
    "convert good.json {}",
    "plan --load load.npy --ranks 32 --slots 288 -o {}",
)
OUTPUTS = {
    "no/map.json": "No such file or directory",
    "folder.json": "Not a regular file",
    "pipe.json": "Not a regular file",
    "good.json/map.json": "Not a directory",
    "loop.json": "Too many levels of symbolic links",
    f"{LONG}.json": "File name too long",
    "map.txt": "a placement is written to .json",
    "map": "a placement is written to .json",
    "map.npy": "a placement is written to .json",
    "/dev/full": "a placement is written to .json",
    "/proc/map.json": "",  # "No such file or directory" or "Permission denied"
}


@pytest.mark.parametrize("line", WRITES)
def test_an_output_that_cannot_be_written_is_named_in_one_line(run, line):
    eplb.save_placement(eplb.spread(num_experts=8, ranks=2), "good.json")
    Path("folder.json").mkdir()
    os.mkfifo("pipe.json")
    Path("loop.json").symlink_to("loop.json")
    before = sorted(os.listdir())
    for name, reason in OUTPUTS.items():
        status, out, err = run(line.format(name))
        assert status == 1, name
        assert err.startswith("error: "), err
        assert name in err
        assert reason in err
        assert err.count("\n") == 1, err
        assert out == ""
        assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("convert map.json map.json", ("OUTPUT=map.json", "FILE=map.json")),
        ("convert map.json ./map.json", ("OUTPUT=map.json", "FILE=map.json")),
        ("convert map.json soft.json", ("OUTPUT=soft.json", "FILE=map.json")),
        ("convert map.json hard.npz", ("OUTPUT=hard.npz", "FILE=map.json")),
        ("plan --load load.npz --ranks 32 --slots 288 -o load.npz", ("--output=load.npz", "--load=load.npz")),
        (
            "plan --load load.npy --ranks 32 --slots 288 --from old.json -o old.json",
            ("--output=old.json", "--from=old.json"),
        ),
        (
            "plan --load load.npy --ranks 32 --slots 288 -o x.json --plot load.npy",
            ("--plot=load.npy", "--load=load.npy"),
        ),
        ("plan --load load.npy --ranks 32 --slots 288 -o x.json --plot x.json", ("--plot=x.json", "--output=x.json")),
        ("simulate --load load.npy --ranks 32 --slots 288 --plot load.npy", ("--plot=load.npy", "--load=load.npy")),
        (
            "simulate --load load.npy --ranks 32 --slots 288 --from old.json --plot old.json",
            ("--plot=old.json", "--from=old.json"),
        ),
    ],
)
def test_no_command_replaces_what_it_reads(run, line, names):
    eplb.save_placement(eplb.spread(num_experts=8, ranks=2), "map.json")
    eplb.save_placement(eplb.spread(num_experts=256, ranks=32, redundant=32, layers=2), "old.json")
    np.savez("load.npz", load=np.load("load.npy"))
    Path("soft.json").symlink_to("map.json")
    Path("hard.npz").hardlink_to("map.json")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    status, out, err = run(line)
    assert status == 1
    assert out == ""
    assert f"error: {names[0]} would replace {names[1]}, the same file: name another one\n" in err
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
