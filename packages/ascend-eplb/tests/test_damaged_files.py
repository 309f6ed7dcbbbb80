# SPDX-License-Identifier: Apache-2.0
"""What readers make of files that are damaged, or that were made to do harm: a ValueError or an OSError that names the file."""

import functools
import io
import json
import os
import pickle
import random
import re
import struct
import warnings
import zipfile

import numpy as np
import pytest

import ascend_eplb as eplb
from ascend_eplb.formats import parse

MUTANTS = 3000  # of each good file


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(arrays, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", npy(array))
    return buffer.getvalue()


@functools.cache
def good_files():
    """name -> (reader, content): a small file of each format, written by this package where it writes the format."""
    placement = eplb.spread(num_experts=4, ranks=2, redundant=2, layers=2)
    ids = placement.physical_to_logical
    load = np.arange(16.0).reshape(2, 2, 4)
    arrays = {
        "phy2log": ids.reshape(2, -1),
        "ranks": np.int32(2),
        "layer_ids": np.array([0, 1]),
        "counts": placement.replicas,
    }
    document = {"moe_layer_count": 2, "layer_list": [
        {"layer_id": layer, "device_count": 2, "device_list": [
            {"device_id": rank, "device_expert": ids[layer, rank].tolist()} for rank in range(2)]} for layer in range(2)
    ]}  # fmt: skip
    yaml = "num_slots: 6\ninitial_global_assignments:\n  3: [0, 1, 2, 2, 3, 0]\n  4: [0, 1, 2, 2, 3, 0]\n"
    placements = {
        "map.json": json.dumps(document).encode(),
        "map.yaml": yaml.encode(),
        "map.npy": npy(ids),
        "stored.npz": npz(arrays, zipfile.ZIP_STORED),
        "deflated.npz": npz(arrays, zipfile.ZIP_DEFLATED),
        "bzip2.npz": npz(arrays, zipfile.ZIP_BZIP2),
        "lzma.npz": npz(arrays, zipfile.ZIP_LZMA),
    }
    steps = {"load_history": [{"logical_expert_load": step} for step in load.tolist()]}
    loads = {
        "load.json": json.dumps(steps).encode(),
        "load.jsonl": b"".join(json.dumps(step).encode() + b"\n" for step in steps["load_history"]),
        "load.npy": npy(load.astype(np.float16)),
        "load.npz": npz({"load": load}, zipfile.ZIP_DEFLATED),
    }
    as_placement = functools.partial(eplb.load_placement, ranks=2)
    return {name: (as_placement, content) for name, content in placements.items()} | {
        name: (eplb.read_loads, content) for name, content in loads.items()
    }


# What the parsers' inner parts stumble over: headers cut in words, deep nesting, long numbers, other types and sizes.
NASTY = (
    b"(", b")", b"{", b"[" * 60, b"]", b"'", b'"', b"\x00", b"\xff\xfe", b"9" * 5000, b"0x" + b"f" * 40, b"-1", b"1e999", b"2147483648",
    b"NaN", b"null", b"true", b"~", b"*a", b"&a [*a]", b"<<: ", b"!!python/object/apply:os.system [true]", b"\\", b"lambda: 0", b"\n ", b"\t",
    b"|O8", b"<f4", b">i8", b"<U9", b"V0", b"<m8[s]", b"9999999999999", b"PK\x01\x02", b"PK\x05\x06", struct.pack("<I", 0xFFFFFFFF),
)  # fmt: skip


def mutant(content, chance):
    """A copy with one to three changes: cut, bytes changed, removed or repeated, something nasty put in or a word replaced by it."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        here = chance.randrange(len(changed) + 1)
        there = min(here + chance.randint(1, 12), len(changed))
        match chance.randrange(6):
            case 0:
                del changed[here:]
            case 1:
                changed[here:there] = chance.randbytes(there - here)
            case 2:
                del changed[here:there]
            case 3:
                changed[here:here] = changed[here:there] * chance.randint(1, 3)
            case 4:
                changed[here:here] = chance.choice(NASTY)
            case 5:
                words = list(re.finditer(rb"\w+", changed))
                if words:
                    word = chance.choice(words)
                    changed[word.start() : word.end()] = chance.choice(NASTY)
    return bytes(changed)


@pytest.mark.parametrize("name", good_files())
def test_mutated_files_give_data_or_an_error_that_names_the_file(tmp_path, name):
    reader, content = good_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    reader(path)
    chance, messages = random.Random(name), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's parser warns of odd headers; a warning is no exception that escapes
        for number in range(MUTANTS):
            damaged = mutant(content, chance)
            path.unlink()  # some file systems wait for the disk when a file is written over
            path.write_bytes(damaged)
            try:
                reader(path)
            except (ValueError, OSError) as error:
                messages.append(str(error))
            except BaseException as error:
                pytest.fail(f"mutant {number} of {name} lets {type(error).__name__} escape: {error}\n{damaged!r}")
    assert all(message.startswith(str(path)) or repr(str(path)) in message for message in messages)
    assert len(messages) > MUTANTS / 4  # most changes are damage; some (white space, other numbers) are not


DEEP = 100_000


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"[" * DEEP, "not JSON: nested too deeply"),
        ("a.json", b'{"a":' * DEEP, "not JSON: nested too deeply"),
        ("a.json", b"1" * 5000, "not JSON: Exceeds the limit"),
        ("a.yaml", b"[" * 5000, "not YAML: nested too deeply"),
        ("a.yaml", b"a: !!python/object/apply:os.system ['true']", "not YAML: could not determine a constructor"),
        ("a.yaml", b"num_slots: 1\ninitial_global_assignments: {1: [0], 0x1: [0]}", "not YAML: a mapping has the key '1' twice"),
        ("a.npy", b"\x93NUMPY", "not a NumPy file of plain arrays: "),
        ("a.npy", b"\x93NUMPY\x01\x00\x08\x00{'descr'", "not a NumPy file of plain arrays: "),
        ("a.npy", b"\x93NUMPY\x09\x00\x08\x00{'descr'", "not a NumPy file of plain arrays: "),
        ("a.npz", b"PK\x03\x04", "not a NumPy file of plain arrays: File is not a zip file"),
        ("a.npy", b"", "not a NumPy file of plain arrays: it starts neither as an array"),
        ("a.npy", pickle.dumps([1]), "not a NumPy file of plain arrays: it starts neither as an array"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_what_to_do(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        eplb.load_placement(tmp_path / name, ranks=1)
    assert str(error.value).startswith(str(tmp_path / name))
    assert str(error.value).endswith("the file is damaged, cut off or of another format: write it again")


class Unpickled:
    """A mine: whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("reader", [eplb.load_placement, eplb.read_loads])
def test_nothing_in_a_file_is_executed(tmp_path, name, reader):
    array = np.array([Unpickled(tmp_path / "executed")], dtype=object)
    if name == "a.npy":
        np.save(tmp_path / name, array, allow_pickle=True)
    else:
        np.savez(tmp_path / name, phy2log=array, load=array)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        reader(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_merge_key_may_be_overridden(tmp_path):
    text = "base: &base {3: [0, 1], 4: [1, 0]}\nnum_slots: 2\ninitial_global_assignments: {<<: *base, 4: [0, 1]}"
    (tmp_path / "a.yaml").write_text(text)
    placement = eplb.load_placement(tmp_path / "a.yaml", ranks=2)
    assert placement.layer_ids == (3, 4)
    assert placement.layer(4).tolist() == [[0], [1]]


def write_layer_ids(path, layer_ids):
    """A placement file whose layers have these numbers, be they right or wrong."""
    if path.suffix == ".json":
        devices = [{"device_id": 0, "device_expert": [0, 1]}]
        layers = [{"layer_id": number, "device_count": 1, "device_list": devices} for number in layer_ids]
        path.write_text(json.dumps({"moe_layer_count": len(layers), "layer_list": layers}))
    elif path.suffix == ".yaml":
        layers = "\n".join(f"  {number}: [0, 1]" for number in layer_ids)
        path.write_text(f"num_slots: 2\ninitial_global_assignments:\n{layers}")
    else:
        np.savez(path, phy2log=[[0, 1]] * len(layer_ids), ranks=1, layer_ids=np.array(layer_ids))


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.npz"])
def test_layer_numbers_have_the_same_rules_in_all_formats(tmp_path, name):
    write_layer_ids(tmp_path / name, [0, 2**31 - 1])
    placement = eplb.load_placement(tmp_path / name, ranks=1)
    assert placement.layer_ids == (0, 2**31 - 1)
    eplb.save_placement(placement, tmp_path / f"again{name}")
    assert eplb.load_placement(tmp_path / f"again{name}", ranks=1) == placement
    for wrong in ([0, 2**31], [-1, 0], [3, 3], [0, 2**63]):
        write_layer_ids(tmp_path / name, wrong)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            eplb.load_placement(tmp_path / name, ranks=1)


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        *((eplb.load_placement, name) for name in ("a.json", "a.yaml", "a.npy", "a.npz")),
        *((eplb.read_loads, name) for name in ("a.json", "a.jsonl", "a.npy", "a.npz")),
        (functools.partial(eplb.append_loads, [[1.0]]), "a.jsonl"),
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, reader, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=rf"Not a regular file: .*{name}"):
        reader(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.json", "a.jsonl"])
def test_a_file_of_absurd_size_is_not_read(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(parse.MOST_BYTES + 1)  # takes no room on the disk
    with pytest.raises(
        ValueError, match=rf"{name}: the file is too large: 4294967297 bytes are more than the 4294967296"
    ):
        eplb.read_loads(tmp_path / name)


def test_an_archive_of_absurd_size_is_not_unpacked(tmp_path, monkeypatch):
    bomb = bytearray(npz({"load": np.zeros((1, 1))}, zipfile.ZIP_DEFLATED))
    at = bomb.rindex(b"PK\x01\x02") + 24  # the inflated size that the archive's directory declares
    bomb[at : at + 4] = struct.pack("<I", 0xFFFFFFF0)
    (tmp_path / "b.npz").write_bytes(bomb)
    monkeypatch.setattr("ascend_eplb.formats.arrays.MOST_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"b\.npz: .* too large when unpacked: 4294967280 bytes are more than"):
        eplb.read_loads(tmp_path / "b.npz")
