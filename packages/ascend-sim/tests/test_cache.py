# SPDX-License-Identifier: Apache-2.0
"""The folder of compiled libraries: whole entries only, and nothing from where somebody else can write."""

import os
import stat

import pytest
from ascend_sim import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder of this user's."""
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(content=b"compiled"):
    """Make the entry, or find it: its folder, and whether it was made now."""
    with cache.entry("thing") as (final, made):
        if made:
            (made / "lib.so").write_bytes(content)
    return final, made is not None


def test_an_entry_is_made_once(folder):
    assert fill() == (folder / "thing", True)
    assert fill() == (folder / "thing", False)
    assert (folder / "thing" / "lib.so").read_bytes() == b"compiled"
    assert sorted(entry.name for entry in folder.iterdir()) == ["thing", "thing.lock"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing", "manifest", "no manifest"])
def test_a_damaged_entry_is_made_anew(folder, damage):
    library, manifest = fill()[0] / "lib.so", folder / "thing" / "manifest.json"
    if damage == "missing":
        library.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest":
        manifest.write_text("[1, 2")
    else:
        library.write_bytes({"cut": b"comp", "flipped": b"kompiled", "empty": b""}[damage])
    assert not cache.is_whole(folder / "thing")
    assert fill()[1]
    assert library.read_bytes() == b"compiled"
    assert cache.is_whole(folder / "thing")


def test_a_failure_leaves_no_entry(folder):
    def fail_halfway():
        with cache.entry("thing") as (_, made):
            (made / "lib.so").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert [entry.name for entry in folder.iterdir()] == ["thing.lock"]


def test_modes_do_not_follow_the_umask(folder):
    old = os.umask(0)
    try:
        fill()
    finally:
        os.umask(old)
    for path in (
        folder,
        folder / "thing",
        folder / "thing" / "lib.so",
        folder / "thing" / "manifest.json",
        folder / "thing.lock",
    ):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


@pytest.mark.parametrize("what", ["", "thing", "thing/lib.so"])
def test_what_others_may_write_is_refused(folder, what):
    fill()
    path = folder / what
    path.chmod(path.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(RuntimeError, match=rf"nothing is loaded from {path}, which others may write .*chmod go-w"):
        fill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["", "thing", "thing/lib.so"])
def test_what_belongs_to_another_user_is_refused(folder, what):
    fill()
    os.chown(folder / what, 12345, 12345)
    with pytest.raises(RuntimeError, match=rf"nothing is loaded from {folder / what}, which belongs to user 12345"):
        fill()


def test_a_folder_that_others_can_replace_is_refused(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "open" / "cache"))
    fill()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(RuntimeError, match=rf"others may replace it, by {tmp_path}/open \(user"):
        fill()
    (tmp_path / "open").chmod(0o1777)  # sticky, as /tmp is
    fill()


def test_links_are_not_followed(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    library = fill()[0] / "lib.so"
    library.unlink()
    library.symlink_to(precious)
    with pytest.raises(RuntimeError, match="which is a link"):
        fill()
    library.unlink()
    (folder / "thing.lock").unlink()
    (folder / "thing.lock").symlink_to(precious)
    with pytest.raises(RuntimeError, match=r"the lock file .*thing.lock cannot be used \(a link\); delete it"):
        fill()
    assert precious.read_text() == "keep me"


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        RuntimeError, match=r"the cache folder .*/file/cache cannot be used \(Not a directory\); set ASCEND_SIM_CACHE"
    ):
        fill()
    assert "cannot be used (Not a directory)" in cache.usable()


def test_the_cache_follows_the_variables(monkeypatch, tmp_path):
    monkeypatch.delenv("ASCEND_SIM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "ascend-sim"
    monkeypatch.setenv("ASCEND_SIM_CACHE", "/somewhere")
    assert str(cache.cache_folder()) == "/somewhere"
