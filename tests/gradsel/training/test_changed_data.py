"""Data that change under the same path between the calls of a run or a comparison."""

from __future__ import annotations

import csv
import json
import shutil
import warnings

import pytest

import gradsel
from gradsel.experiments.comparing import compare
from gradsel.training import RunError
from gradsel.training.changed import difference, fingerprint
from gradsel.training.config import DataConfig
from gradsel.training.data import read_data
from gradsel.training.run import Stopped
from tests.support import runs


@pytest.fixture
def data(tmp_path):
    return runs.image_folder(tmp_path / "images", train=4, val=2, test=2)


def remove(data):
    (data / "train/red/3.png").unlink()


def another_label(data):
    (data / "train/red/3.png").rename(data / "train/blue/4.png")


def another_picture(data):
    shutil.copy(data / "train/red/3.png", data / "test/red/1.png")


CHANGES = [
    (remove, "the train set has 11 samples, and had 12"),
    (another_label, r"the train set has as many samples as before \(12\), but files, texts or labels differ"),
    (another_picture, r"the test set has as many samples as before \(6\), but files, texts or labels differ"),
    (lambda data: (data / "val").rename(data / "set aside"), "there is no validation set now"),
]
IDS = ["removed", "another label", "another picture", "no validation set"]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=IDS)
def test_a_run_is_not_resumed_on_other_data(change, message, data, tmp_path):
    config = runs.image_run(data, tmp_path / "run", recipe__epochs=1)
    with pytest.raises(Stopped):
        gradsel.finetune(config, callbacks=[runs.Interrupt(1)], quiet=True)
    copy = shutil.copytree(data, tmp_path / "copy")
    change(data)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(RunError, match=f"has changed since the run in .*run began: {message}.*; put the data back"):
        gradsel.resume(tmp_path / "run", quiet=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files
    shutil.rmtree(data)
    copy.rename(data)
    gradsel.resume(tmp_path / "run", quiet=True)


def test_a_comparison_does_not_go_on_with_other_data(data, tmp_path):
    config = runs.image_run(data, tmp_path / "compared", recipe__epochs=1)
    compare(config, ["linear"], seeds=1, factors=[1], quiet=True)
    compare(config, ["linear"], seeds=1, factors=[1], quiet=True)
    remove(data)
    with pytest.raises(RunError, match=r"has changed since the comparison in .* the train set has 11 samples, and had"):
        compare(config, ["linear", "bias"], seeds=1, factors=[1], quiet=True)
    assert not (tmp_path / "compared/runs/bias").exists()


def test_evaluate_tells_that_its_test_set_is_another(data, tmp_path):
    gradsel.finetune(runs.image_run(data, tmp_path / "run", recipe__epochs=1), quiet=True)
    remove(data)  # of the training set, which evaluate() does not use
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradsel.evaluate(tmp_path / "run")
    (data / "test/red/0.png").unlink()
    with pytest.warns(UserWarning, match="these are not the numbers of its results.json: the test set has 5 samples"):
        gradsel.evaluate(tmp_path / "run")


def test_runs_of_older_versions_are_resumed_and_damaged_files_are_told(data, tmp_path):
    config = runs.image_run(data, tmp_path / "run", recipe__epochs=1)
    with pytest.raises(Stopped):
        gradsel.finetune(config, callbacks=[runs.Interrupt(1)], quiet=True)
    (tmp_path / "run/data.json").write_text("[]")
    with pytest.raises(RunError, match=r"data\.json is damaged"):
        gradsel.resume(tmp_path / "run", quiet=True)
    (tmp_path / "run/data.json").unlink()
    gradsel.resume(tmp_path / "run", quiet=True)


def test_the_fingerprint_of_texts_is_of_every_letter(table, tmp_path):
    def of(path):
        return fingerprint(read_data(DataConfig(path=str(path))), str(path))

    rows = list(csv.reader(table.open()))
    total = len(rows) - 1
    assert of(table) == of(shutil.copy(table, tmp_path / "moved.csv"))
    for column, value in ((0, "another text"), (1, "bad" if rows[1][1] == "good" else "good")):
        other = [list(row) for row in rows]
        other[1][column] = value
        with (tmp_path / "other.csv").open("w", newline="") as file:
            csv.writer(file).writerows(other)
        found = of(tmp_path / "other.csv")
        assert sum(split["samples"] for split in found.values()) == total
        assert difference(of(table), found)


def test_it_does_not_matter_how_the_path_is_written(data, monkeypatch):
    """Nor where the data lie: the names of files count from there."""
    monkeypatch.chdir(data.parent)
    moved = shutil.copytree(data, data.parent / "moved")
    found = [fingerprint(read_data(DataConfig(path=path)), path) for path in ("images", str(data), str(moved))]
    assert found[0] == found[1] == found[2]
    assert json.loads(json.dumps(found[0])) == found[0]
