"""Comparisons: what is tried, what counts, what is written, and going on."""

from __future__ import annotations

import csv
import json
import math
import shutil

import pytest
import torch

from gradsel.cli import main as cli
from gradsel.errors import RunError
from gradsel.experiments import working
from gradsel.experiments.comparing import Contestant, compare
from gradsel.experiments.tidy import mean_and_deviation
from tests.support import runs, tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return runs.image_folder(tmp_path_factory.mktemp("data") / "images", train=5, test=4)


@pytest.fixture
def counted(monkeypatch):
    """The folders of the runs that are begun."""
    begun = []

    def finetune(config, **options):
        begun.append(config)
        return original(config, **options)

    original = working.finetune
    monkeypatch.setattr(working, "finetune", finetune)
    return begun


def settings(images, output):
    return runs.image_run(images, output, recipe__epochs=1)


def rows(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def test_rates_are_chosen_on_validation_and_seeds_are_tested(images, tmp_path, counted):
    output = tmp_path / "compared"
    found = compare(settings(images, output), ["linear", "gps:k=2"], seeds=2, factors=[1, 3], quiet=True)
    written = rows(output)
    assert [(row["split"], row["method"], row["seed"]) for row in written] == [
        (split, name, seed)
        for name in ("linear", "gps:k=2")
        for split, seed in (("validation", "0"), ("validation", "0"), ("test", "0"), ("test", "1"))
    ]
    for name in ("linear", "gps:k=2"):
        tried = [row for row in written if row["method"] == name and row["split"] == "validation"]
        best = max(tried, key=lambda row: (float(row["value"]), -float(row["learning_rate"])))
        final = [row for row in written if row["method"] == name and row["split"] == "test"]
        assert {row["learning_rate"] for row in final} == {best["learning_rate"]}
        assert all("at the end of those tried" in row["note"] for row in final)
    assert json.loads(written[-1]["config"])["k"] == 2
    for config in counted:
        searching = "rate-" in config.output.folder
        assert config.data.validation_holdout == (0.2 if searching else None)
        assert config.data.split_seed == 0
    seeds = [json.loads((output / "runs/linear" / name / "results.json").read_text()) for name in ("seed-0", "seed-1")]
    assert [result["samples"] for result in seeds] == 2 * [{"train": 15, "test": 12}]
    assert [result["metrics"]["top1"] for result in seeds] == [row.value for row in found.rows[2:4]]
    table = (output / "table.md").read_text()
    assert "2 learning rates on the validation set" in table
    assert "± " in table
    assert str(found) in table
    assert (output / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_where_there_is_a_validation_set_the_best_of_the_tried_runs_counts(tmp_path, counted):
    """It would be repeated to the bit: the data are the same, and so is the seed."""
    data = runs.image_folder(tmp_path / "images", train=4, val=4, test=4)
    config = settings(data, tmp_path / "compared")
    found = compare(config, ["linear"], seeds=2, factors=[1, 3], quiet=True)
    assert [(row.split, row.seed) for row in found.rows] == [
        ("validation", 0), ("validation", 0), ("test", 0), ("test", 1),
    ]  # fmt: skip
    assert len(counted) == 3
    again = compare(
        config.replaced({"output.folder": str(tmp_path / "alone"), "recipe.learning_rate": None}), ["linear"], seeds=1,
        factors=[found.rows[2].learning_rate / 1e-2], quiet=True,
    )  # fmt: skip
    assert again.rows[0].value == found.rows[2].value
    first = tmp_path / "compared" / "runs" / "linear" / f"rate-{found.rows[2].learning_rate:.3g}"
    for name, tensor in runs.tensors(first).items():
        assert torch.equal(tensor, runs.tensors(tmp_path / "alone" / "runs" / "linear" / "seed-0")[name]), name


def test_it_goes_on_where_it_stopped_also_with_more_seeds_and_methods(images, tmp_path, counted, monkeypatch):
    output = tmp_path / "compared"
    original = working.finetune

    def stops(config, **options):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return original(config, **options)

    with monkeypatch.context() as patched:
        patched.setattr(working, "finetune", stops)
        with pytest.raises(KeyboardInterrupt):
            compare(settings(images, output), ["linear"], seeds=2, factors=[1, 3], quiet=True)
    assert len(rows(output)) == 2
    half = output / "runs" / "linear" / "seed-0"
    half.mkdir()
    (half / "labels.json").write_text("cut off")
    compare(settings(images, output), ["linear"], seeds=1, factors=[1, 3], quiet=True)
    assert len(counted) == 3
    compare(settings(images, output), ["linear", "bias"], seeds=1, factors=[1, 3], quiet=True)
    assert len(counted) == 6
    before = (output / "results.csv").read_text()
    compare(settings(images, output), ["linear", "bias"], seeds=1, factors=[1, 3], quiet=True)
    assert len(counted) == 6
    assert (output / "results.csv").read_text() == before
    other = settings(images, output).replaced({"recipe.epochs": 2})
    with pytest.raises(ValueError, match="has a comparison with other settings of recipe"):
        compare(other, ["linear"], seeds=1, factors=[1, 3], quiet=True)


def test_rows_and_table_have_the_methods_of_all_calls(images, tmp_path, counted):
    output = tmp_path / "compared"
    config = settings(images, output)
    compare(config, ["linear"], seeds=2, factors=[1, 3], quiet=True)
    first = rows(output)
    found = compare(config, ["gps:k=2"], seeds=1, factors=[1, 3], quiet=True)
    assert rows(output)[:4] == first
    assert [row["method"] for row in rows(output)[4:]] == 3 * ["gps:k=2"]
    assert len(found.rows) == 7
    assert str(found).endswith("\n\nFrom earlier calls: linear.")
    assert [line.split(" | ")[:3:2] for line in str(found).splitlines()[2:4]] == [["| linear", "2"], ["| gps:k=2", "1"]]
    assert str(found) in (output / "table.md").read_text()
    # Fewer seeds of a method do not remove the others, nor are runs repeated.
    before, begun = (output / "results.csv").read_bytes(), len(counted)
    found = compare(config, ["gps:k=2", "linear"], seeds=1, factors=[1, 3], quiet=True)
    assert (output / "results.csv").read_bytes() == before
    assert "From earlier calls" not in str(found)
    assert len(counted) == begun
    # What has been removed is gone.
    shutil.rmtree(output / "runs" / "gps-k=2")
    found = compare(config, ["linear"], seeds=2, factors=[1, 3], quiet=True)
    assert rows(output) == first
    assert found.earlier == []


def test_methods_of_earlier_calls_that_have_no_result_are_named(images, tmp_path, monkeypatch):
    output = tmp_path / "compared"
    original = working.finetune

    def fails(config, **options):
        if config.method.name == "bias":
            raise ValueError("bias is not finite")
        return original(config, **options)

    monkeypatch.setattr(working, "finetune", fails)
    with pytest.raises(RunError, match="no learning rate gave a result"):
        compare(settings(images, output), ["bias"], seeds=1, factors=[1, 3], quiet=True)
    (output / "runs" / "bias").mkdir(parents=True)
    found = compare(settings(images, output), ["linear"], seeds=1, factors=[1, 3], quiet=True)
    assert [row["method"] for row in rows(output)] == 2 * ["bias"] + 3 * ["linear"]
    assert math.isnan(found.rows[0].value)
    assert str(found).endswith("\n\nFrom earlier calls, without a result: bias.")


def test_rows_that_something_else_has_changed_are_refused(images, tmp_path):
    output = tmp_path / "compared"
    compare(settings(images, output), ["linear"], seeds=1, factors=[1], quiet=True)
    text = (output / "results.csv").read_text()
    for other in (text.replace(",", ";"), text.replace("top1,", "top1,high"), text.replace("seed", "number")):
        (output / "results.csv").write_text(other)
        with pytest.raises(RunError, match=r"output.folder: .*results\.csv is not as it was written .*; remove it"):
            compare(settings(images, output), ["bias"], seeds=1, factors=[1], quiet=True)
        assert (output / "results.csv").read_text() == other
    (output / "results.csv").unlink()
    compare(settings(images, output), ["linear"], seeds=1, factors=[1], quiet=True)
    assert (output / "results.csv").read_text() == text


def test_several_at_a_time_give_the_rows_of_one_after_another(images, tmp_path):
    """Two methods, one of which diverges at a high rate, in this process and in two others."""
    found = {}
    for jobs in (1, 2):
        output = tmp_path / str(jobs)
        methods = ["linear", "gps:k=2"]
        compared = compare(settings(images, output), methods, seeds=1, factors=[1, 1e30], quiet=True, jobs=jobs)
        assert len(rows(output)) == 6
        found[jobs] = [{**row, "step_ms": bool(row["step_ms"])} for row in rows(output)]
        assert str(compared) in (output / "table.md").read_text()
    assert found[1] == found[2]
    assert ["has diverged" in row["note"] for row in found[1]].count(True) == 1


def test_a_rate_that_diverges_scores_nothing(images, tmp_path, monkeypatch):
    original = working.finetune

    def diverges(config, **options):
        if config.recipe.learning_rate > 0.05:
            raise ValueError("head.weight has values that are not finite")
        return original(config, **options)

    monkeypatch.setattr(working, "finetune", diverges)
    found = compare(settings(images, tmp_path / "compared"), ["linear"], seeds=1, factors=[1, 9], quiet=True)
    good, bad, final = found.rows
    assert math.isnan(bad.value)
    assert "not finite" in bad.note
    assert final.learning_rate == good.learning_rate == 0.01
    assert "1 of 2 learning rates gave no result" in (tmp_path / "compared" / "table.md").read_text()
    with pytest.raises(ValueError, match="linear: no learning rate gave a result; the last said: head"):
        compare(settings(images, tmp_path / "other"), ["linear"], seeds=1, factors=[9, 27], quiet=True)


def test_rates_are_not_tried_without_a_sample_for_validation(tmp_path, counted, capsys):
    data = runs.image_folder(tmp_path / "images", train=1, test=1)
    config = settings(data, tmp_path / "compared")
    with pytest.raises(RunError, match=r"no class has a second training sample .*; pass --factors 1"):
        compare(config, ["linear"], seeds=1, factors=[1, 3])
    assert not counted
    assert not (tmp_path / "compared").exists()
    compare(config, ["linear"], seeds=1, factors=[1])
    assert "linear, seed 0: " in capsys.readouterr().err


def test_a_rate_without_a_result_says_why_as_it_goes(images, tmp_path, monkeypatch, capsys):
    def fails(config, **options):
        raise ValueError("training has diverged")

    monkeypatch.setattr(working, "finetune", fails)
    with pytest.raises(RunError) as raised:
        compare(settings(images, tmp_path / "compared"), ["linear"], seeds=1, factors=[1, 3])
    assert "learning rate 0.01 on the validation set: training has diverged\n" in capsys.readouterr().err
    assert "has the others" not in str(raised.value)


def test_what_does_not_fit_is_said_before_the_first_run(images, tmp_path, counted):
    output = tmp_path / "compared"
    config = settings(images, output)
    for methods, options, message in (
        (["linear", "linear"], {}, "at least one, each once"),
        ([], {}, "at least one"),
        (["gpz"], {}, "did you mean gps"),
        (["gps:k"], {}, "must be NAME:OPTION=VALUE"),
        (["gps:k=0"], {}, "k >= 1, got 0"),
        (["linear"], {"seeds": 0}, "seeds must be an integer >= 1, got 0"),
        (["linear"], {"jobs": 0}, "jobs must be an integer >= 1, got 0"),
        (["linear"], {"factors": []}, "factors must be positive"),
        (
            ["linear", "miss:rank=900", "shira:rank=900"],
            {},
            "miss:rank=900: miss of rank 900 does not fit.*; shira:rank",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            compare(config, methods, **options)
    with pytest.raises(RunError, match=r"data\.task is segmentation, but only classifiers are compared"):
        compare(config.replaced({"data.task": "segmentation"}), ["linear"])
    assert not counted
    assert not output.exists()
    output.mkdir()
    (output / "mine").write_text("")
    with pytest.raises(ValueError, match="exists and is not empty"):
        compare(config, ["linear"])


def test_the_command(images, tmp_path, capsys):
    options = [f"--model-option={name}={value}" for name, value in tiny.VIT.items()]
    arguments = [
        "compare", "--data", str(images), "--model", "vit_tiny_patch16_224", "--weights", "none", *options,
        "--methods", "linear, gps:skip_blocks=[0,1],", "--seeds", "1", "--factors", "1", "--epochs", "1",
        "--batch-size", "6", "--device", "cpu", "--jobs", "1", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed[2:]] == ["| linear", "| gps:skip_blocks=[0,1]"]
    assert "its own learning rate, not tuned" in (tmp_path / "run" / "table.md").read_text()
    assert cli.main([*arguments[:-1], str(images), "--methods", "gps"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_contestants_are_methods_with_options():
    each = Contestant.of("gps:k=2:scope=net:skip_blocks=[0, 1]")
    assert each.how.options()["skip_blocks"] == [0, 1]
    assert (each.how.k, each.how.scope) == (2, "net")


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert mean_and_deviation([1.0]) == (1.0, None)
