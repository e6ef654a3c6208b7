"""Files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gradsel.interrupts import uninterrupted

if sys.platform != "win32":
    import fcntl

PathLike = str | os.PathLike[str]

#: Unfinished files are in folders of these names, beside the files that they will replace.
_PREFIX, _SUFFIX = ".gradsel-", ".tmp"


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Yields a path to write to; at the end of the block, that file replaces ``path``. See :func:`replacing_all`."""
    with replacing_all([path]) as (unfinished,):
        yield unfinished


@contextmanager
def replacing_all(paths: Sequence[PathLike]) -> Iterator[list[Path]]:
    """Yields paths to write to; at the end of the block, these files take the places of ``paths``, the last one last.

    Each is written in a folder beside its target, with a random name, that only this user can enter, so that nobody
    else can plant a file or link there. It is flushed to disk before it replaces its target. A block that fails, and
    a crash before its end, leave the old files. If there are several, the last one should be the index that the others
    are found by: the old one is removed before any of them is replaced, so that no index ever names files of two sets.

    Symbolic links are followed, and stay. A file that is replaced keeps its permissions and, where that is allowed, its
    owner; a new one has those that the umask leaves. What killed processes have left behind in these folders is
    removed.

    Raises:
        OSError: a folder does not exist, a target is not a regular file, or writing fails; the old files are still
            there.
    """
    targets = [_target(path) for path in paths]
    with ExitStack() as stack:
        stages = {folder: stack.enter_context(_stage(folder)) for folder in dict.fromkeys(t.parent for t in targets)}
        unfinished = [stages[target.parent] / f"{number}-new" for number, target in enumerate(targets)]
        modes = [_created(path) for path in unfinished]
        yield unfinished
        for path, mode, target in zip(unfinished, modes, targets, strict=True):
            _permit(path, mode, target)
            _flush(path)
        with uninterrupted():
            if len(targets) > 1:
                targets[-1].unlink(missing_ok=True)
            for path, target in zip(unfinished, targets, strict=True):
                os.replace(path, target)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            for folder in stages:
                _flush_folder(folder)


@contextmanager
def filling(folder: PathLike, index: Sequence[str]) -> Iterator[Path]:
    """Yields an empty folder for whoever writes files by names of its own; at the end, they go to ``folder`` as a set.

    ``folder`` is created with the folders above it. Files in it with other names stay. A block that fails leaves all of
    it as it was. See :func:`replacing_all`, also for permissions and links.

    Args:
        index: names of files by which the others are found. Old ones are removed before anything is replaced, and new
            ones come last, so that no index ever names files of two sets.

    Raises:
        OSError: see :func:`replacing_all`.
    """
    folder = Path(folder)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _stage(folder) as stage:
            mode = _created(stage / "mode")
            new = stage / "new"
            new.mkdir()
            yield new
            _fill(folder, new, index, mode)
    except BaseException:
        if not existed:
            with suppress(OSError):  # something is in it by now
                folder.rmdir()
        raise


def _fill(folder: Path, new: Path, index: Sequence[str], mode: int) -> None:
    files = sorted((path for path in new.rglob("*") if path.is_file()), key=lambda path: (path.name in index, path))
    for path in files:
        (folder / path.relative_to(new)).parent.mkdir(parents=True, exist_ok=True)
    targets = {path: _target(folder / path.relative_to(new)) for path in files}
    old = [_target(folder / name) for name in index]
    for path, target in targets.items():
        _permit(path, mode, target)
        _flush(path)
    with uninterrupted():
        for target in old:
            target.unlink(missing_ok=True)
        for path, target in targets.items():
            os.replace(path, target)
    if os.name == "posix":
        for parent in dict.fromkeys(target.parent for target in targets.values()):
            _flush_folder(parent)


@contextmanager
def locked(folder: PathLike) -> Iterator[bool]:
    """Locks a folder while the block runs, and yields whether that went; otherwise another process has locked it.

    The lock ends with the process, however that ends, and leaves no file. Where folders cannot be locked, as on Windows
    and on some file systems over a network, nobody is kept out.
    """
    if sys.platform == "win32":
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        except OSError:
            ours = True
        yield ours
    finally:
        os.close(descriptor)


def require_folder(path: PathLike) -> None:
    """Checks that a file can be written to ``path``, as far as that is known beforehand.

    Raises:
        OSError: its folder does not exist, or there is something else than a regular file.
    """
    _target(path)


def _target(path: PathLike) -> Path:
    """What is really replaced: the end of all symbolic links."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write to does not exist, create it first", str(path))
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "a file is to be written, but there is a folder", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "only a regular file can be replaced, and this is none", str(path))
    return target


def _created(path: Path) -> int:
    """Creates an empty file and returns the permissions that the umask, or the folder, gives it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _permit(path: Path, mode: int, target: Path) -> None:
    """Gives a file the permissions of its target or, if that does not exist, those in ``mode``."""
    with suppress(FileNotFoundError):
        old = target.stat()
        mode = old.st_mode & 0o777
        if os.name == "posix":
            with suppress(OSError):
                os.chown(path, old.st_uid, old.st_gid)
    os.chmod(path, mode)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    try:
        _flush(folder)
    except OSError as error:  # not every file system can; the file is there, so this is no failure
        warnings.warn(
            f"{folder} cannot be flushed to disk ({error}): after a power failure it may have the old files",
            stacklevel=2,
        )


# --- Folders of unfinished files: locked as long as their process lives ------------------------------------------


@contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder`` that only this user can enter; it is removed in the end."""
    _remove_stale(folder)
    path, lock = _locked_folder(folder)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(folder: Path) -> tuple[Path, int | None]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=folder))
        lock = None
        try:
            lock = _lock(path, wait=True)
            if lock is None or os.path.samestat(os.fstat(lock), os.stat(path)):
                return path, lock
            os.close(lock)
        except FileNotFoundError:  # taken for a stale one and removed before it was locked
            if lock is not None:
                os.close(lock)
        except BaseException:
            if lock is not None:
                os.close(lock)
            shutil.rmtree(path, ignore_errors=True)
            raise


def _remove_stale(folder: Path) -> None:
    """Removes the folders of this user whose processes no longer live, as their locks are gone with them."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if not (entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX)):
                continue
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                    continue
                lock = _lock(Path(entry.path), wait=False)
                if lock is not None:
                    try:
                        shutil.rmtree(entry.path, ignore_errors=True)
                    finally:
                        os.close(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """Locks a folder, no link to one, until the result is closed; None if it is locked already, or cannot be."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
