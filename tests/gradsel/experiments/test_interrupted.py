"""Comparisons that are killed, started twice, changed, or whose methods fail."""

from __future__ import annotations

import contextlib
import csv
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gradsel.cli.running import run as command
from gradsel.errors import RunError
from gradsel.experiments import working
from gradsel.experiments.comparing import compare
from gradsel.files import locked
from gradsel.methods import method
from tests.support import runs

ROOT = Path(__file__).parents[3]
posix = pytest.mark.skipif(os.name != "posix", reason="folders are not locked, and processes not killed like this")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return runs.image_folder(tmp_path_factory.mktemp("data") / "images", train=4, test=2)


def settings(images, output):
    return runs.image_run(images, output, recipe__epochs=1)


def rows(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


@pytest.fixture
def failing(monkeypatch):
    """Makes runs of a method fail."""
    errors = {}
    original = working.finetune

    def finetune(config, **options):
        if config.method.name in errors:
            raise errors[config.method.name]
        return original(config, **options)

    monkeypatch.setattr(working, "finetune", finetune)
    return errors


@pytest.mark.parametrize("factors", [[1], [1, 3]], ids=["not tuned", "tuned"])
def test_a_method_that_fails_is_told_after_the_others(images, tmp_path, failing, factors):
    failing["bias"] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    output = tmp_path / "compared"
    with pytest.raises(RunError, match=r"1 of 2 methods failed \(bias: .*out of memory: CUDA.*\); .*table\.md has"):
        compare(settings(images, output), ["bias", "linear"], seeds=1, factors=factors, quiet=True)
    assert [row["method"] for row in rows(output) if row["split"] == "test"] == ["linear"]
    table = (output / "table.md").read_text()
    assert "| linear |" in table
    assert "| bias |" not in table
    assert "bias: " in table
    failing.clear()
    compare(settings(images, output), ["bias", "linear"], seeds=1, factors=factors, quiet=True)
    assert "| bias |" in (output / "table.md").read_text()


@posix
def test_a_folder_in_which_another_process_is_at_work_is_refused(images, tmp_path):
    output = tmp_path / "compared"
    output.mkdir()
    with locked(output) as ours:
        assert ours
        with pytest.raises(RunError, match=r"another process is at work in .*compared"):
            compare(settings(images, output), ["linear"], seeds=1, factors=[1], quiet=True)
    assert not list(output.iterdir())
    compare(settings(images, output), ["linear"], seeds=1, factors=[1], quiet=True)


def test_settings_that_are_cut_off_are_written_anew_and_damaged_ones_are_refused(images, tmp_path):
    output = tmp_path / "compared"
    output.mkdir()
    (output / "compare.yaml.new").write_text("mod")
    compare(settings(images, output), ["linear"], seeds=1, factors=[1], quiet=True)
    for text, message in (("a: [", "cannot be read"), ("", "damaged: it has no settings")):
        (output / "compare.yaml").write_text(text)
        with pytest.raises(RunError, match=rf"output.folder: .*compare\.yaml.* {message}"):
            compare(settings(images, output), ["linear"], seeds=1, factors=[1], quiet=True)


def test_methods_whose_runs_would_share_a_folder_are_refused(images, tmp_path):
    methods = ["gps:blocks=[0, 1]", "gps:blocks=[0,-1]"]
    with pytest.raises(RunError, match="have the same folder; leave out blanks"):
        compare(settings(images, tmp_path / "compared"), methods, seeds=1, factors=[1], quiet=True)
    assert not (tmp_path / "compared").exists()


def test_a_run_of_another_method_is_not_taken_for_this_one(images, tmp_path):
    config = settings(images, tmp_path / "run").replaced({"method.name": "linear"})
    working.run_or_continue(config)
    assert working.run_or_continue(config)["metrics"]
    working.run_or_continue(config.replaced({"method.options": method("linear").options()}))  # its defaults
    for changes in ({"method.name": "bias"}, {"seed": 5}):
        with pytest.raises(RunError, match="begun with another method or seed; remove it"):
            working.run_or_continue(config.replaced(changes))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_one_line_and_the_rows_before_stay(images, tmp_path, capsys):
    output = tmp_path / "compared"
    compare(settings(images, output), ["linear"], seeds=1, factors=[1], quiet=True)
    before = (output / "results.csv").read_bytes()
    (output / "results.csv.new").symlink_to("/dev/full")
    again = functools.partial(compare, settings(images, output), ["linear"], seeds=1, factors=[1], quiet=True)
    assert command("compare", again) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (output / "results.csv").read_bytes() == before


_WORKS = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/python"]
from gradsel.experiments import working

def sleeps(config):
    open({mark!r}, "w").write(str(__import__("os").getpid()))
    time.sleep(600)

working._worked = sleeps
if __name__ == "__main__":
    with working.workers(2) as start:
        start(None)()
"""


@posix
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Otherwise they would go on in folders that a comparison started anew works in."""
    mark, script = tmp_path / "mark", tmp_path / "works.py"
    script.write_text(_WORKS.format(root=str(ROOT), mark=str(mark)))
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        worker = _until(lambda: int(mark.read_text() or 0) if mark.exists() else 0)
    finally:
        parent.kill()
        parent.wait()
    try:
        assert _until(lambda: not _alive(worker))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def _until(found, seconds=120.0):
    end = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


def _alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # one that nobody waits for has ended, too
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@posix
def test_a_worker_that_is_killed_is_told():
    with working.workers(2) as start:
        ask = start(None)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="a process of --jobs was killed"):
            ask()
