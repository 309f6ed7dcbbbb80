# SPDX-License-Identifier: Apache-2.0
"""The folder of compiled libraries: whole entries only, and nothing from where somebody else can write."""

import errno
import fcntl
import grp
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ascend_sim import cache

OTHERS = 12345  # no user and no group of this number
PARTS = ["", "thing", "thing/lib.so", "thing/manifest.json"]


NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


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


MANIFESTS = ["{}", "[]", "null", "3", '{"lib.so": 3}', "[1, 2", "[" * 100000]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing", "more", *MANIFESTS, "no manifest"])
def test_a_damaged_entry_is_made_anew(folder, damage):
    library, manifest = fill()[0] / "lib.so", folder / "thing" / "manifest.json"
    if damage == "missing":
        library.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "more":
        (folder / "thing" / "other.so").write_bytes(b"not compiled here")
    elif damage in MANIFESTS:
        manifest.write_text(damage)
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


@pytest.mark.parametrize("mode", [stat.S_IWOTH, pytest.param(stat.S_IWGRP, marks=NEEDS_ROOT)])
@pytest.mark.parametrize("what", PARTS)
def test_what_others_may_write_is_refused(folder, what, mode):
    fill()
    path = folder / what
    if mode == stat.S_IWGRP:
        os.chown(path, -1, OTHERS)
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(RuntimeError, match=rf"nothing is loaded from {path}, which others may write .*chmod go-w"):
        fill()


def test_a_changed_library_with_a_manifest_that_others_may_write_is_refused(folder):
    library, manifest = fill()[0] / "lib.so", folder / "thing" / "manifest.json"
    for file, content in ((library, "changed"), (manifest, "{}")):
        file.chmod(0o666)
        file.write_text(content)
    with pytest.raises(RuntimeError, match=rf"nothing is loaded from {manifest}, which others may write"):
        fill()


@pytest.mark.parametrize("members", [[], ["me"], ["me", "you"]])
def test_a_group_of_this_user_alone_is_nobody_else(folder, monkeypatch, members):
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(("me", "x", uid, os.getegid(), "", "/", "sh")))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group(("me", "x", gid, members)))
    fill()
    os.chown(folder, -1, os.getegid())
    folder.chmod(0o775)
    if "you" in members:
        with pytest.raises(RuntimeError, match=rf"nothing is loaded from {folder}, which others may write"):
            fill()
    else:
        assert fill() == (folder / "thing", False)


@NEEDS_ROOT
@pytest.mark.parametrize("what", PARTS)
def test_what_belongs_to_another_user_is_refused(folder, what):
    fill()
    os.chown(folder / what, OTHERS, OTHERS)
    with pytest.raises(RuntimeError, match=rf"nothing is loaded from {folder / what}, which belongs to user 12345"):
        fill()


@pytest.mark.parametrize("mode", [0o777, pytest.param(0o775, marks=NEEDS_ROOT)])
def test_a_folder_that_others_can_replace_is_refused(tmp_path, monkeypatch, mode):
    (tmp_path / "open").mkdir()
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "open" / "cache"))
    fill()
    if mode == 0o775:
        os.chown(tmp_path / "open", -1, OTHERS)
    (tmp_path / "open").chmod(mode)
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
    with pytest.raises(RuntimeError, match=rf"nothing is loaded from {library}, which is a link"):
        fill()
    manifest = folder / "thing" / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(RuntimeError, match=rf"nothing is loaded from {manifest}, which is a link"):
        fill()
    manifest.unlink()
    library.unlink()
    (folder / "thing.lock").unlink()
    (folder / "thing.lock").symlink_to(precious)
    with pytest.raises(RuntimeError, match=r"the lock file .*thing.lock cannot be used \(a link\); delete it"):
        fill()
    assert precious.read_text() == "keep me"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_the_folder_is_refused_and_one_above_it_is_followed(tmp_path, monkeypatch, there):
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "link"))
    with pytest.raises(
        RuntimeError, match=rf"nothing is loaded from {tmp_path}/link, which is a link; .*ASCEND_SIM_CACHE"
    ):
        fill()
    if there:
        monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "link" / "cache"))
        assert fill() == (tmp_path / "real" / "cache" / "thing", True)


def test_who_owns_the_root_of_the_file_system_is_trusted_with_what_is_above_the_folder(folder, monkeypatch):
    """As root of a user namespace: / and what lies below it, as far as it is not this user's, show user 65534."""
    fill()
    stat_of = Path.stat

    def stat_in_namespace(path, **arguments):
        found = stat_of(path, **arguments)
        above = path in folder.parents
        return os.stat_result((*found[:4], 65534 if above else found.st_uid, *found[5:10]))

    monkeypatch.setattr(Path, "stat", stat_in_namespace)
    assert fill() == (folder / "thing", False)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        RuntimeError, match=r"the cache folder .*/file/cache cannot be used \(Not a directory\); set ASCEND_SIM_CACHE"
    ):
        fill()
    assert "cannot be used (Not a directory)" in cache.usable()


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("ASCEND_SIM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(RuntimeError, match="has no home folder; set ASCEND_SIM_CACHE to a folder of your own"):
        fill()


@pytest.mark.parametrize("step", ["flock", "mkdtemp", "rename", "fsync", "rmtree"])
def test_an_error_of_the_system_names_the_folder_and_the_remedy(folder, monkeypatch, step):
    def fail(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if step == "rmtree":
        (fill()[0] / "lib.so").unlink()  # the damaged entry is to be deleted
    place = {"flock": fcntl, "mkdtemp": cache.tempfile, "rename": Path, "fsync": os, "rmtree": cache.shutil}[step]
    with monkeypatch.context() as patch:
        patch.setattr(place, step, fail)
        with pytest.raises(RuntimeError, match=rf"{folder}.* \(No locks available\); set ASCEND_SIM_CACHE to a folder"):
            fill()
    assert fill()[1]
    assert sorted(entry.name for entry in folder.iterdir()) == ["thing", "thing.lock"]


def test_an_error_of_who_fills_the_entry_stays_as_it_is(folder):
    def fail_halfway():
        with cache.entry("thing") as _:
            raise FileNotFoundError(errno.ENOENT, "No such file", "/bin/sh")

    with pytest.raises(FileNotFoundError, match="/bin/sh"):
        fail_halfway()


def test_who_waits_for_another_process_says_so(folder):
    """The other one is this process, which fills the entry when it reads that it is waited for."""
    with cache.entry("thing") as (_, made):
        (made / "lib.so").write_bytes(b"compiled")
        code = "from ascend_sim import cache\nwith cache.entry('thing') as (_, made): print(made)"
        other = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = other.stderr.readline()
    assert said == f"ascend-sim: waiting for another process, which fills {folder}/thing (a minute or two) ...\n"
    assert other.communicate(timeout=1800) == ("None\n", "")


def test_the_cache_follows_the_variables(monkeypatch, tmp_path):
    monkeypatch.delenv("ASCEND_SIM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "ascend-sim"
    monkeypatch.setenv("ASCEND_SIM_CACHE", "/somewhere")
    assert str(cache.cache_folder()) == "/somewhere"
