"""Files appear whole or not at all: whoever writes beside, whatever fails, and whenever the process dies."""

from __future__ import annotations

import errno
import os
import stat
import threading
import warnings

import pytest

from gradsel import files
from gradsel.files import filling, replacing, replacing_all, require_folder
from tests.support.faults import counting, killed_at

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions, links and locks are those of POSIX")


def write(path, text="new"):
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


# --- Whose file it is --------------------------------------------------------------------------------------------


def test_permissions_are_those_of_the_umask_or_of_the_old_file(tmp_path, umask):
    write(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    (tmp_path / "a").chmod(0o604)
    write(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o604


def test_every_writer_gives_the_same_permissions(tmp_path, umask):
    """safetensors alone writes files that only their owner can read."""
    from gradsel import Selection, TaskBank, export
    from tests.support.deltas import delta_of, trained

    _, selection, model = trained()
    delta, plain = delta_of(x={0: 1.0})
    delta.save(tmp_path / "delta")
    Selection(selection).save(tmp_path / "selection")
    export(model, tmp_path / "checkpoint")
    bank = TaskBank(plain)
    bank.add("a", delta)
    bank.save(tmp_path / "bank")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_a_link_stays_and_its_end_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real").write_text("old")
    (tmp_path / "link").symlink_to("there/real")
    (tmp_path / "dangling").symlink_to("there/nothing yet")
    for name in ("link", "dangling"):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "new"
    assert names(tmp_path / "there") == ["nothing yet", "real"]


def test_nobody_can_plant_a_link_where_it_is_written(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    for name in ("a.tmp", f"a.{os.getpid()}.tmp", "0-new", ".gradsel-.tmp", ".gradsel-aaaaaaaa.tmp"):
        (tmp_path / name).symlink_to(victim)
    seen = []
    with replacing(tmp_path / "a") as unfinished:
        seen.append(unfinished.parent)
        assert stat.S_IMODE(unfinished.parent.stat().st_mode) == 0o700
        unfinished.write_text("new")
    with replacing(tmp_path / "a") as unfinished:
        seen.append(unfinished.parent)
    assert seen[0] != seen[1]
    assert victim.read_text() == "untouched"
    assert (tmp_path / ".gradsel-aaaaaaaa.tmp").is_symlink()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path.mkdir(), IsADirectoryError, "there is a folder"),
        (lambda path: os.mkfifo(path), OSError, "only a regular file can be replaced"),
        (lambda path: path.symlink_to("no folder/file"), FileNotFoundError, "the folder to write to does not exist"),
    ],
)
def test_what_is_no_file_is_not_replaced(make, error, message, tmp_path):
    path = tmp_path / "a"
    make(path)
    for use in (write, require_folder):
        with pytest.raises(error, match=message):
            use(path)
    assert names(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError, match="create it first"):
        write(tmp_path / "missing" / "a")


# --- Others who write --------------------------------------------------------------------------------------------


def test_threads_may_save_to_one_path(tmp_path):
    failed = []

    def save(number):
        try:
            for _ in range(20):
                write(tmp_path / "a", str(number) * 1000)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set((tmp_path / "a").read_text())) == 1
    assert names(tmp_path) == ["a"]


def test_what_a_dead_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    dead = tmp_path / ".gradsel-12345678.tmp"
    dead.mkdir()
    (dead / "0-new").write_text("half")
    (tmp_path / ".gradsel-notes").mkdir()
    with replacing(tmp_path / "b") as unfinished:
        write(tmp_path / "a")
        unfinished.write_text("b")
    assert names(tmp_path) == [".gradsel-notes", "a", "b"]
    assert (tmp_path / "b").read_text() == "b"


# --- What fails --------------------------------------------------------------------------------------------------


def replace_two(folder, text):
    with replacing_all([folder / "shard", folder / "index"]) as unfinished:
        for path in unfinished:
            path.write_text(text)


def fill_with_two(folder, text):
    with filling(folder, index=["index"]) as new:
        for name in ("index", "shard"):
            (new / name).write_text(text)


each_way = pytest.mark.parametrize("write_two", [replace_two, fill_with_two])


@each_way
def test_every_call_may_fail(write_two, tmp_path):
    """Each call of a save fails once, as on a full or broken disk: the old files stay, and nothing else."""
    write_two(tmp_path, "old")
    failures = 0
    for number in range(1, 200):
        reached = []

        def fail(count, name, number=number, reached=reached):
            if count == number:
                reached.append(name)
                raise OSError(errno.ENOSPC, "No space left on device")

        with counting(fail), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a folder that could not be flushed
            try:
                write_two(tmp_path, "new")
            except OSError:
                failures += 1
        if not reached:
            break
        texts = {name: (tmp_path / name).read_text() for name in ("shard", "index") if (tmp_path / name).exists()}
        assert "index" not in texts or len(set(texts.values())) == 1, reached  # an index is of the shard's set
        write_two(tmp_path, "old")
        assert names(tmp_path) == ["index", "shard"]
    assert failures > 8


@each_way
def test_the_process_may_die_at_every_call(write_two, tmp_path):
    write_two(tmp_path, "old")
    number = 0
    while True:
        number += 1
        if not killed_at(number, lambda: write_two(tmp_path, "new")):
            break
        texts = {name: (tmp_path / name).read_text() for name in ("shard", "index") if (tmp_path / name).exists()}
        assert "index" not in texts or len(set(texts.values())) == 1
        write_two(tmp_path, "old")
        assert names(tmp_path) == ["index", "shard"]  # what it had begun is removed by the next save
    assert number > 10
    assert (tmp_path / "index").read_text() == "new"


def test_a_folder_is_filled_as_a_set(tmp_path, umask):
    """By whoever names the files: others stay, and all get the usual permissions."""
    (tmp_path / "out").mkdir()
    for name in ("mine", "index", "old index"):
        (tmp_path / "out" / name).write_text("old")
    with filling(tmp_path / "out", index=["index", "old index"]) as new:
        (new / "shard").touch(mode=0o600)
        (new / "index").write_text("new")
        (new / "sub").mkdir()
        (new / "sub" / "file").write_text("new")
        assert (tmp_path / "out" / "index").read_text() == "old"
    assert names(tmp_path / "out") == ["index", "mine", "shard", "sub"]
    assert (tmp_path / "out" / "mine").read_text() == "old"
    assert stat.S_IMODE((tmp_path / "out" / "shard").stat().st_mode) == 0o640
    assert names(tmp_path / "out" / "sub") == ["file"]


def test_a_block_that_fails_makes_no_folder(tmp_path):
    def fail():
        with filling(tmp_path / "a" / "b", index=[]) as new:
            (new / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path / "a") == []


def test_a_folder_that_cannot_be_flushed_is_only_warned_of(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(UserWarning, match="cannot be flushed"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_file_systems_without_locks_will_do(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    (tmp_path / ".gradsel-12345678.tmp").mkdir()  # whoever made it may live
    write(tmp_path / "a")
    assert names(tmp_path) == [".gradsel-12345678.tmp", "a"]
