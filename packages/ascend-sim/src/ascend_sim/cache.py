# SPDX-License-Identifier: Apache-2.0
"""The folder of compiled libraries: who may write it, entries that appear whole or not at all, and the check of what is loaded from it.

Code in this folder runs in every process that imports torch. So, as ssh does with its keys, nothing is taken from it that somebody else could
have written: the folder, its entries and all their files belong to this user or to root, nobody else may write them, and none of them is a link.
Each folder above it belongs to this user or to root too, and nobody else can replace what is in it; links among those folders are followed. Who
is in a group that is this user's own (of the user's name, with no other member, as most Linux distributions make one) is not somebody else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import hashlib
import json
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ascend_sim.messages import say

__all__ = ["cache_folder", "entry", "is_whole", "root", "usable"]

_MANIFEST = "manifest.json"
_REMEDY = "set ASCEND_SIM_CACHE to a folder of your own"


def cache_folder() -> Path:
    """Where compiled libraries are kept: ASCEND_SIM_CACHE, or `ascend-sim` in the user's cache folder.

    Raises:
        RuntimeError: neither is known; with the remedy.
    """
    if folder := os.environ.get("ASCEND_SIM_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend-sim"
    except RuntimeError as error:
        raise RuntimeError(
            f"there is no folder for the cache: user {os.geteuid()} has no home folder; {_REMEDY}"
        ) from error


def root() -> Path:
    """The cache folder, made if it is not there and known to be this user's.

    Raises:
        RuntimeError: it cannot be made, or somebody else could write it; with the remedy.
    """
    folder = cache_folder()
    with _errors_of(folder):
        for missing in reversed([one for one in (folder, *folder.parents) if not one.exists()]):
            with contextlib.suppress(FileExistsError):  # another process may be here too
                missing.mkdir(0o755)
                missing.chmod(0o755)  # whatever the umask is
        _check_trusted(folder, stat.S_ISDIR)
        folder = folder.resolve(strict=True)
        _check_parents(folder)
    return folder


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that names the cache folder and the remedy."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(folder)) else f": {error.filename}"
        raise RuntimeError(
            f"the cache folder {folder} cannot be used ({error.strerror or error}{where}); {_REMEDY}"
        ) from error


def usable() -> str:
    """Why nothing can be compiled into the cache folder; "" where it can. Makes the folder if it is not there."""
    try:
        folder = root()
    except RuntimeError as error:
        return str(error)
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the cache folder {folder} cannot be written; {_REMEDY}"
    return ""


@contextlib.contextmanager
def entry(name: str) -> Iterator[tuple[Path, Path | None]]:
    """Yield (the entry's folder, a folder to fill, or None if the entry is there and whole).

    What was filled gets a manifest of its files, is written through to the disk, and is then renamed into place: an entry is whole or absent,
    also after a crash. A damaged one is made anew. Several processes may start at once; one of them fills.

    Raises:
        RuntimeError: the cache folder cannot be used, or somebody else could write the entry.
    """
    folder = root()
    final = folder / name
    if is_whole(final):
        yield final, None
        return
    if problem := usable():
        damaged = " and the entry in it is damaged" if final.exists() else ""
        raise RuntimeError(problem + damaged)
    with _locked(folder / f"{name}.lock"):
        if is_whole(final):
            yield final, None
            return
        with _errors_of(folder):
            if final.exists():
                shutil.rmtree(final)
            for unfinished in folder.glob(f".{name}-*"):  # by a compile that was killed
                shutil.rmtree(unfinished)
            scratch = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}-"))
        try:
            made = scratch / "made"
            with _errors_of(folder):
                made.mkdir()
            yield final, made
            with _errors_of(folder):
                _seal(made)
                made.rename(final)
                _write_through(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def is_whole(final: Path) -> bool:
    """Whether an entry is there, and holds what was written and nothing else: a damaged library would end the process that loads it.

    Raises:
        RuntimeError: somebody else could have written it.
    """
    try:
        _check_trusted(final, stat.S_ISDIR)
        _check_trusted(final / _MANIFEST, stat.S_ISREG)
        sizes = json.loads((final / _MANIFEST).read_text(encoding="utf-8"))
        if not sizes or set(os.listdir(final)) != {_MANIFEST, *sizes}:
            return False
        for name, (size, digest) in sizes.items():
            file = final / name
            _check_trusted(file, stat.S_ISREG)
            if file.stat().st_size != size or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                return False
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        # Absent, or a manifest that is damaged too.
        return False
    return True


def _check_trusted(path: Path, is_kind: Callable[[int], bool]) -> None:
    """RuntimeError unless `path` is of a kind, no link, this user's or root's, and written by nobody else. OSError where there is none."""
    found = path.lstat()
    remedy = f"delete {path} or mend it, or {_REMEDY}"
    if not is_kind(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else f"of mode {stat.filemode(found.st_mode)}"
        raise RuntimeError(f"nothing is loaded from {path}, which is {kind}; {remedy}")
    if found.st_uid not in (0, os.geteuid()):
        raise RuntimeError(
            f"nothing is loaded from {path}, which belongs to user {found.st_uid}, and not to you or root; {remedy}"
        )
    if _others_write(found):
        raise RuntimeError(
            f"nothing is loaded from {path}, which others may write (mode {stat.filemode(found.st_mode)}, group {found.st_gid}); "
            f"chmod go-w it, or {_REMEDY}"
        )


def _check_parents(folder: Path) -> None:
    """RuntimeError if somebody else could put another folder in the place of `folder`."""
    # Whoever owns / can replace Python as well. In a user namespace that does not map root, / and what else is root's show user 65534.
    owners = {0, os.geteuid(), Path("/").stat().st_uid}
    for parent in folder.parents:
        found = parent.stat()
        if found.st_uid not in owners or (_others_write(found) and not found.st_mode & stat.S_ISVTX):
            raise RuntimeError(
                f"nothing is loaded from {folder}: others may replace it, by {parent} (user {found.st_uid}, group {found.st_gid}, mode "
                f"{stat.filemode(found.st_mode)}); chmod go-w {parent} if it is yours, or {_REMEDY}"
            )


def _others_write(found: os.stat_result) -> bool:
    """Whether anybody but the owner may write a file or folder."""
    return bool(found.st_mode & stat.S_IWOTH) or (
        bool(found.st_mode & stat.S_IWGRP) and not _is_own_group(found.st_gid)
    )


def _is_own_group(gid: int) -> bool:
    """Whether a group is this user's own: the user's primary group, of the user's name, without other members."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:  # unknown here
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is made if it is not there and never written. The lock goes with a killed process."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = "a link" if error.errno == errno.ELOOP else error.strerror
        raise RuntimeError(f"the lock file {path} cannot be used ({reason}); delete it, or {_REMEDY}") from error
    try:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(
                    f"ascend-sim: waiting for another process, which fills {path.with_suffix('')} (a minute or two) ..."
                )
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # not every network file system has locks
            raise RuntimeError(
                f"the lock file {path} cannot be locked ({error.strerror}); {_REMEDY}, on a local disk"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _seal(made: Path) -> None:
    """Write the manifest, give every file its mode whatever the umask is, and write all of it through to the disk."""
    files = sorted(file for file in made.iterdir() if file.is_file())
    sizes = {file.name: (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}
    (made / _MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")
    for file in [*files, made / _MANIFEST]:
        file.chmod(0o644)
        _write_through(file)
    made.chmod(0o755)
    _write_through(made)


def _write_through(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
