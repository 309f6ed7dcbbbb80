# SPDX-License-Identifier: Apache-2.0
import errno
import json
import logging
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest

import ascend_eplb as eplb
from ascend_eplb.formats.atomic import write_atomically

GOLDEN = {
    "moe_layer_count": 2,
    "layer_list": [
        {"layer_id": layer, "device_count": 2, "device_list": [
            {"device_id": 0, "device_expert": [7, 2, 0, 3, 5]}, {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]}]}
        for layer in range(2)
    ],
}  # fmt: skip


def write(path, document):
    path.write_text(json.dumps(document))
    return path


def test_golden_json_and_its_exact_round_trip(tmp_path):
    placement = eplb.load_placement(write(tmp_path / "map.json", GOLDEN))
    assert placement.physical_to_logical.tolist() == [[[7, 2, 0, 3, 5], [6, 1, 4, 7, 2]]] * 2
    eplb.save_placement(placement, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == GOLDEN
    assert eplb.load_placement(tmp_path / "again.json") == placement


@pytest.mark.parametrize("name", ["map.json", "map.npz", "map.yaml", "map.yml"])
def test_round_trips(tmp_path, name):
    generator = np.random.default_rng(0)
    plan = eplb.rebalance(generator.lognormal(0, 1, (3, 20)), ranks=4, slots=28)
    placement = eplb.Placement(plan.placement.physical_to_logical, 20, (3, 4, 9))
    eplb.save_placement(placement, tmp_path / name)
    assert eplb.load_placement(tmp_path / name, ranks=4) == placement
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_ids_count_and_not_the_order_of_the_lists(tmp_path):
    shuffled = json.loads(json.dumps(GOLDEN))
    shuffled["layer_list"][1]["device_list"][0]["device_expert"] = [2, 7, 0, 3, 5]
    straight = eplb.load_placement(write(tmp_path / "a.json", shuffled))
    shuffled["layer_list"].reverse()
    for layer in shuffled["layer_list"]:
        layer["device_list"].reverse()
    assert eplb.load_placement(write(tmp_path / "b.json", shuffled)) == straight


DEVICE = ("layer_list", 1, "device_list", 0)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("moe_layer_count",), 3, r"\$\.moe_layer_count is 3, but \$\.layer_list holds 2 layers"),
        (("moe_layer_count",), "2", r"\$\.moe_layer_count must be a whole number"),
        (("layer_list",), [], r"\$\.layer_list must be a list with at least one entry"),
        (("layer_list", 1), 5, r"\$\.layer_list\[1\] must be an object, not int"),
        (("layer_list", 1, "layer_id"), 0, r"\$\.layer_list\[1\]\.layer_id is 0, as \$\.layer_list\[0\]\.layer_id"),
        (("layer_list", 1, "device_count"), 3, r"\$\.layer_list\[1\]\.device_count is 3, .* holds 2 devices"),
        ((*DEVICE, "device_id"), 1, r"device_list\[1\]\.device_id is 1; the ids must be 0\.\.1, each once"),
        ((*DEVICE, "device_id"), 2, r"device_list\[0\]\.device_id is 2; the ids must be 0\.\.1"),
        ((*DEVICE, "device_expert"), [7, 2, 0, 3], r"\$\.layer_list\[1\]\.device_list: .* equally many experts"),
        (
            (*DEVICE, "device_expert", 3),
            -1,
            r"\$\.layer_list\[1\]\.device_list\[0\]\.device_expert\[3\] must be a whole",
        ),
        ((*DEVICE, "device_expert", 3), True, r"device_expert\[3\] must be a whole number"),
        ((*DEVICE, "device_expert", 3), 7, r"device_list\[0\]\.device_expert\[3\]: expert 7 is already in slot 0"),
        ((*DEVICE, "device_expert", 3), 1, r"\$\.layer_list\[1\]: expert 3 of 0\.\.7 is on no device"),
    ],
)
def test_json_errors_name_the_path(tmp_path, path, value, words):
    document = json.loads(json.dumps(GOLDEN))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=words):
        eplb.load_placement(write(tmp_path / "map.json", document))


def test_more_json_errors(tmp_path):
    document = json.loads(json.dumps(GOLDEN))
    del document["layer_list"][0]["device_list"][1]["device_id"]
    with pytest.raises(ValueError, match=r"\$\.layer_list\[0\]\.device_list\[1\]\.device_id is missing"):
        eplb.load_placement(write(tmp_path / "map.json", document))
    (tmp_path / "map.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="has the key 'a' twice"):
        eplb.load_placement(tmp_path / "map.json")
    (tmp_path / "map.json").write_text("{")
    with pytest.raises(ValueError, match=r"map\.json: not JSON: .*line 1"):
        eplb.load_placement(tmp_path / "map.json")
    with pytest.raises(ValueError, match=r"expert 7 is not in 0\.\.6"):
        eplb.load_placement(write(tmp_path / "map.json", GOLDEN), num_experts=7)
    with pytest.raises(ValueError, match="holds 2 ranks, ranks=4 was asked for"):
        eplb.load_placement(tmp_path / "map.json", ranks=4)
    with pytest.raises(FileNotFoundError):
        eplb.load_placement(tmp_path / "none.json")
    for call in (eplb.load_placement, lambda path: eplb.save_placement(eplb.spread(num_experts=2, ranks=1), path)):
        with pytest.raises(ValueError, match=r"map\.txt: a placement .*\.json \(Ascend map\)"):
            call(tmp_path / "map.txt")


def test_layers_beyond_the_file_take_the_default_with_a_notice(tmp_path, caplog):
    path = write(tmp_path / "map.json", GOLDEN)
    with caplog.at_level(logging.WARNING, logger="ascend_eplb"):
        placement = eplb.load_placement(path, layers=3)
    assert "The placement lacks layers 2, which take the default placement (spread)." in caplog.text
    assert placement.layer(2).tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]
    assert placement.layer(1).tolist() == [[7, 2, 0, 3, 5], [6, 1, 4, 7, 2]]
    caplog.clear()
    assert eplb.load_placement(path, layers=[1, 2, 3]).layers == 3
    assert "lacks layers 2-3, which take the default placement (spread); its layers 0 are left out." in caplog.text
    caplog.clear()
    assert eplb.load_placement(path, layers=[1]).layer_ids == (1,)
    assert not caplog.records
    with pytest.raises(ValueError, match="layers=0 must be at least one layer"):
        eplb.load_placement(path, layers=0)


def test_deepseek_arrays(tmp_path):
    ids = np.array([[7, 2, 0, 3, 5, 6, 1, 4, 7, 2]])
    np.save(tmp_path / "flat.npy", ids)
    np.save(tmp_path / "full.npy", ids.reshape(1, 2, 5))
    flat = eplb.load_placement(tmp_path / "flat.npy", ranks=2)
    assert flat == eplb.load_placement(tmp_path / "full.npy")
    with pytest.raises(ValueError, match="give ranks"):
        eplb.load_placement(tmp_path / "flat.npy")
    eplb.save_placement(flat, tmp_path / "map.npz")
    arrays = dict(np.load(tmp_path / "map.npz"))
    assert arrays["counts"].tolist() == [[1, 1, 2, 1, 1, 1, 1, 2]]
    assert arrays["log2phy"].tolist() == [[[2, -1], [6, -1], [1, 9], [3, -1], [7, -1], [4, -1], [5, -1], [0, 8]]]
    for name in ("counts", "log2phy"):
        broken = {key: value.copy() for key, value in arrays.items()}
        broken[name].flat[0] += 1
        np.savez(tmp_path / "broken.npz", **broken)
        with pytest.raises(ValueError, match=f"'{name}' does not agree"):
            eplb.load_placement(tmp_path / "broken.npz")
    padded = np.concatenate([arrays["log2phy"][:, :, ::-1], np.full((1, 8, 3), -1)], axis=2)
    np.savez(tmp_path / "padded.npz", phy2log=ids, log2phy=padded)
    assert eplb.load_placement(tmp_path / "padded.npz", ranks=2) == flat
    (tmp_path / "map.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="not a NumPy file"):
        eplb.load_placement(tmp_path / "map.npz")
    for name, value in (("counts", 4), ("log2phy", 4), ("ranks", [2, 2]), ("ranks", "x"), ("layer_ids", [0.5])):
        np.savez(tmp_path / "map.npz", **{"phy2log": ids, "ranks": 2, name: np.array(value)})
        with pytest.raises(ValueError, match=rf"map\.npz: '{name}'"):
            eplb.load_placement(tmp_path / "map.npz")
    np.savez(tmp_path / "map.npz", other=ids)
    with pytest.raises(ValueError, match="no array 'phy2log', only other"):
        eplb.load_placement(tmp_path / "map.npz")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_slots: [", "not YAML"),
        ("3", "must be a mapping"),
        ("num_slots: 4", "must map layer numbers"),
        ("num_slots: 4\ninitial_global_assignments: {a: [0, 1, 2, 3]}", r"\.a: a layer number"),
        ("num_slots: 4\ninitial_global_assignments: {3: [0, 1, 2, x]}", r"\.3: must be a list of expert ids"),
        ("num_slots: 4\ninitial_global_assignments: {3: [0, 1, 2]}", r"\.3: holds 3 slots, num_slots is 4"),
        ("num_slots: 4\ninitial_global_assignments: {3: [0, 0, 1, 2]}", "layer 3, rank 0, slot 1: expert 0 is already"),
    ],
)
def test_yaml_errors(tmp_path, text, words):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        eplb.load_placement(tmp_path / "map.yaml", ranks=2)


def test_yaml_keeps_model_global_layer_numbers(tmp_path):
    (tmp_path / "map.yaml").write_text("num_slots: 4\ninitial_global_assignments: {5: [0, 1, 2, 3], 3: [3, 2, 1, 0]}")
    placement = eplb.load_placement(tmp_path / "map.yaml", ranks=2)
    assert placement.layer_ids == (3, 5)
    assert placement.layer(5).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="give ranks"):
        eplb.load_placement(tmp_path / "map.yaml")


def test_without_pyyaml_the_error_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "import ascend_eplb as e\n"
        f"e.save_placement(e.spread(num_experts=2, ranks=1), {str(tmp_path / 'x.yaml')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RuntimeError: YAML needs pyyaml: pip install 'ascend-eplb[yaml]'" in done.stderr


@pytest.mark.parametrize("name", ["load.json", "load.jsonl", "load.npy", "load.npz"])
def test_load_dumps(tmp_path, name):
    history = np.random.default_rng(0).random((3, 2, 5))
    eplb.write_loads(history, tmp_path / name)
    assert np.array_equal(eplb.read_loads(tmp_path / name), history)
    eplb.write_loads(history[0], tmp_path / name)
    assert np.array_equal(eplb.read_loads(tmp_path / name), history[:1])


def test_loads_are_appended_and_an_interrupted_line_is_no_loss(tmp_path):
    history, path = np.random.default_rng(0).random((4, 20, 500)), tmp_path / "load.jsonl"
    eplb.append_loads(history[0], path)
    eplb.append_loads(history[1:3], path)
    assert np.array_equal(eplb.read_loads(path), history[:3])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # within the last line, which is longer than what is read at once
    assert np.array_equal(eplb.read_loads(path), history[:2])
    eplb.append_loads(history[3], path)
    assert np.array_equal(eplb.read_loads(path), history[[0, 1, 3]])
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"load.jsonl: has no whole line"):
        eplb.read_loads(path)
    eplb.append_loads(history[0], path)
    assert np.array_equal(eplb.read_loads(path), history[:1])
    with pytest.raises(ValueError, match=r"load.npz: loads are appended to .jsonl alone"):
        eplb.append_loads(history, tmp_path / "load.npz")


def test_a_failed_append_leaves_the_lines_that_were_there(tmp_path):
    """A limit on the size of files stands for a full disk: the second of three steps is cut."""
    history, path = np.arange(10.0).reshape(5, 1, 2), tmp_path / "load.jsonl"
    eplb.append_loads(history[:2], path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) * 7 // 4, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(f"File too large: {str(path)!r}")):
            eplb.append_loads(history[2:], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    eplb.append_loads(history[2:], path)
    assert np.array_equal(eplb.read_loads(path), history)


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_an_error_at_any_time_of_an_append_leaves_the_lines_that_were_there(tmp_path, monkeypatch, step):
    path = tmp_path / "load.jsonl"
    eplb.append_loads([[1.0]], path)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr("ascend_eplb.formats.loads._write_all", lambda file, _: (file.write(b"half"), fail()))
        with pytest.raises(OSError, match=r"Input/output error: .*load\.jsonl"):
            eplb.append_loads([[2.0]], path)
    assert eplb.read_loads(path).tolist() == [[[1.0]]]
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]\n", "line 1: logical_expert_load is missing"),
        ('{"logical_expert_load": [[1]]}\n{\n', "not JSON lines: line 2: Expecting property name"),
        ('{"logical_expert_load": [[1]], "logical_expert_load": [[2]]}\n', "line 1: .*'logical_expert_load' twice"),
        ("[" * 100_000 + "\n", "line 1: nested too deeply"),
    ],
)
def test_errors_in_json_lines(tmp_path, text, words):
    (tmp_path / "load.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        eplb.read_loads(tmp_path / "load.jsonl")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", r"\$\.load_history must be a list"),
        ('{"load_history": [{}]}', r"\$\.load_history\[0\]\.logical_expert_load is missing"),
        ('{"load_history": [{"logical_expert_load": [[1, -2]]}]}', "step 0, layer 0, expert 1 is -2;"),
        ('{"load_history": [{"logical_expert_load": [[1, NaN]]}]}', "step 0, layer 0, expert 1 is nan"),
        ('{"load_history": [{"logical_expert_load": [[1, "x"]]}]}', "must be numbers"),
    ],
)
def test_load_dump_errors(tmp_path, text, words):
    (tmp_path / "load.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        eplb.read_loads(tmp_path / "load.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "map.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_other_things_are_refused(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"Not a regular file: .*pipe"):
        write_atomically(tmp_path / "pipe", b"new")


def test_a_written_file_has_the_usual_mode(tmp_path):
    umask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", b"x")
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    (tmp_path / "a").chmod(0o600)
    write_atomically(tmp_path / "a", b"y")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
