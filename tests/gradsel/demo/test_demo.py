"""``gradsel demo``: what it prepares and prints, and the studies."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy
import pytest
from PIL import Image

from gradsel.cli import main as cli
from gradsel.demo import demo, digits, study

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Data and a hardly pre-trained model."""
    folder = tmp_path_factory.mktemp("demo")
    demo.prepare(folder, quiet=True, epochs=1)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_folders_hold_every_digit_once_and_parts_share_none(tmp_path):
    images, targets = digits.digits()
    whole = digits.write_folder(tmp_path / "whole", digits.NEW, {"train": 100, "val": 20, "test": None})
    assert sorted(path.name for path in whole.iterdir()) == ["test", "train", "val"]
    for digit in digits.NEW:
        name = digits.NAMES[digit]
        assert len(list((whole / "train" / name).iterdir())) == 100
        assert len(list((whole / "val" / name).iterdir())) == 20
        numbers = [int(path.stem) for path in whole.glob(f"*/{name}/*.png")]
        assert sorted(numbers) == numpy.flatnonzero(targets == digit).tolist()
    path = next(whole.glob("train/seven/*.png"))
    assert numpy.array_equal(numpy.asarray(Image.open(path)), images[int(path.stem)])
    tuning, reported = (
        digits.write_folder(tmp_path / name, digits.NEW, {"train": 20, "test": None}, 3, part)
        for name, part in (("tuning", study.TUNING), ("reported", study.REPORTED))
    )
    first, second = ({path.name for path in folder.rglob("*.png")} for folder in (tuning, reported))
    assert not first & second
    assert len(first | second) == (targets >= 5).sum()


def test_a_seed_draws_the_same_images_again_and_another_seed_others(tmp_path):
    drawn = [
        contents(digits.write_folder(tmp_path / name, [5], {"train": 20, "test": None}, seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0].keys() != drawn[2].keys()


def test_the_command_runs_what_it_prints_and_ends_with_the_report(prepared, monkeypatch, capsys):
    monkeypatch.setattr(demo.command, "__defaults__", (1,))
    assert cli.main(["demo", "--output", str(prepared), "--quiet"]) == 0
    printed = capsys.readouterr().out
    line = re.search(r"^  gradsel (finetune .+)$", printed, re.MULTILINE)[1]
    report = Path(printed.splitlines()[-1])
    assert report == (prepared / "run" / "report.html").resolve()
    assert report.is_file()
    results = json.loads((prepared / "run" / "results.json").read_text())
    assert f"{results['metrics']['top1']:.1f} % of {results['metrics']['samples']} test images" in printed
    again = [*shlex.split(line)[:-1], str(prepared / "again")]
    assert cli.main(again) == 0
    same = json.loads((prepared / "again" / "results.json").read_text())
    assert same["metrics"] == results["metrics"]
    assert demo.new_output(prepared) == prepared / "run-2"


def test_what_is_prepared_is_used_again_and_what_was_interrupted_is_completed(tmp_path, prepared, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    monkeypatch.setattr(demo, "finetune", lambda *args, **kwargs: pytest.fail("it is there already"))
    demo.prepare(prepared, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    half = tmp_path / "digits.new" / "train"
    half.mkdir(parents=True)
    (half / "left over").touch()
    demo._as_a_whole(tmp_path / "digits", lambda new: digits.write_folder(new, [5], {"train": 1}))
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert not (tmp_path / "digits" / "train" / "left over").exists()


@pytest.fixture(scope="module")
def results(prepared):
    return study.run("ablation", (0,), quiet=True, folder=prepared, shots=2, epochs=1, tested=4)


def test_variants_train_about_as_many_weights_and_differ_in_which(results):
    neurons = 64 + 4 * (192 + 64 + 256 + 64)
    rest = neurons + 65 * 5  # biases and head
    trained = {row.variant: row.trained - rest for row in results.rows}
    assert trained.keys() == {each.name for variants in study.ABLATION.values() for each in variants}
    rows = {name for name in trained if name.startswith("rows")}
    exact = trained.keys() - rows - {"layer"}
    assert {trained[name] for name in exact} == {neurons}
    assert abs(trained["layer"] - neurons) <= 17  # each layer rounds
    assert {trained[name] for name in rows} == {12 + 4 * (64 + 64 + 64 + 256)}  # one row of each matrix
    options = {(row.method, str(row.options)) for row in results.rows}
    assert len(options) == len(results.rows)
    assert all(len(row.accuracies) == 1 for row in results.rows)


def test_tables_and_files_have_every_variant(results, tmp_path):
    table = study.table(results)
    gps = next(row for row in results.rows if row.variant == study.GPS.name)
    for row in results.rows:
        name = f"**{row.variant}**" if row is gps else row.variant
        against = "" if row is gps else f"{row.mean - gps.mean:+.1f}"
        assert f"| {name} | {row} | {against} | {row.share:.2f} | {row.bytes:,} |" in table
    study.save(results, tmp_path / "ablation.json")
    assert study.load(tmp_path / "ablation.json") == results
    study.draw(results, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_study_of_methods_from_the_command_line(prepared, monkeypatch, capsys):
    run = study.run
    monkeypatch.setattr(study, "run", lambda *args: run(*args, shots=2, epochs=1, tested=4))
    assert cli.main(["demo", "--study", "methods", "--seeds", "0", "--output", str(prepared), "--quiet"]) == 0
    printed = capsys.readouterr().out
    for variants in study.METHODS.values():
        assert all(each.name in printed for each in variants)
    saved = study.load(prepared / "methods.json")
    full = next(row for row in saved.rows if row.variant == "full fine-tuning")
    assert full.trained == full.parameters
    assert (prepared / "methods.png").stat().st_size > 10_000
    assert saved.test_images == 20


@pytest.mark.parametrize("name", study.STUDIES)
def test_committed_studies_are_those_of_today(name):
    """The same variants, rates and settings as the code has."""
    saved = study.load(ROOT / "docs" / "demo" / f"{name}.json")
    assert (saved.study, saved.seeds, saved.shots, saved.epochs) == (name, [0, 1, 2], study.SHOTS, study.EPOCHS)
    rows = [(row.variant, row.method, row.options, row.rate) for row in saved.rows]
    variants = [each for of in study.STUDIES[name].values() for each in of]
    assert rows == [(each.name, each.method, dict(each.options), each.rate) for each in variants]


@pytest.mark.parametrize("name", study.STUDIES)
def test_documented_figures_are_those_of_the_committed_study(name):
    page = (ROOT / "docs" / "selection.md").read_text()
    assert study.table(study.load(ROOT / "docs" / "demo" / f"{name}.json")) in page
