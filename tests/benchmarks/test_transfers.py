"""The benchmark of two real transfers: its samples, its plan, what it measures and what its tables say, on toy data."""

from __future__ import annotations

import csv

import numpy as np
import pytest

pytest.importorskip("timm")
pytest.importorskip("peft")
from benchmarks.pages import transfers as page
from benchmarks.transfers import __main__ as program
from benchmarks.transfers import cost, data, plan
from gradsel.experiments import compare
from gradsel.experiments.comparing import Contestant
from tests.support import runs


def test_splits_are_disjoint_balanced_and_always_the_same():
    samples = [(f"{label}{number}", label) for label in "ab" for number in range(20)]
    splits = data.drawn(samples, train=5, validation=3, test=10)
    assert splits == data.drawn(reversed(samples), train=5, validation=3, test=10)
    names = [name for split in splits.values() for name, _ in split]
    assert len(set(names)) == len(names)
    for split, count in (("train", 5), ("val", 3)):
        assert [label for _, label in splits[split]].count("a") == count
        assert len(splits[split]) == 2 * count
    assert len(splits["test"]) == 10
    with pytest.raises(ValueError, match="b: none is left for testing of at most 8 samples"):
        data.drawn(samples[:28], train=5, validation=3, test=10)


def test_reviews_are_short_clear_and_there_once():
    lines = [
        "1\t2.5\ta warm and funny film",
        "2\t-1.0\ta cold and dull film",
        "3\t0.9\ta film about two people",
        "4\t3.0\tfine",
        f"5\t3.0\t{'long ' * 13}",
        "6\t2.4\ta warm and funny film",
    ]
    assert data.clear_reviews(lines) == [
        ("a warm and funny film", "positive"),
        ("a cold and dull film", "negative"),
    ]


def test_digits_are_dark_on_white():
    values = np.zeros((8, 8))
    values[2:6, 2:6] = 16
    picture = data.picture(values)
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert max(picture.getpixel((32, 32))) < 10


def test_the_plan_names_methods_with_options_and_later_stages_repeat_earlier_ones():
    ran = {}
    for transfer, methods in program.stages(None):
        assert set(ran.get(transfer, ())) < set(methods)
        ran[transfer] = methods
    for transfer, methods in ran.items():
        assert [str(Contestant.of(text).how.name) for text in methods]
        assert set(plan.TABLE[transfer]) <= set(methods)
    assert {transfer for transfer, _ in program.stages("digits")} == {"digits"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A comparison on toy images, in the place of the digits."""
    root = tmp_path_factory.mktemp("transfers")
    images = runs.image_folder(root / "digits", train=4, val=4, test=4)
    config = runs.image_run(
        images, root / "compared" / "digits", recipe__epochs=1, recipe__mixup=0.0, recipe__cutmix=0.0
    )
    return root, config, compare(config, ["linear", "gps:k=2"], seeds=2, factors=[1, 3], quiet=True)


def test_rows_of_a_comparison_go_to_the_results_file(toy, tmp_path):
    root, _, found = toy
    file = tmp_path / "transfers-cpu.csv"
    program.collect(root, file)
    rows = list(csv.DictReader(file.open()))
    assert [row["method"] for row in rows] == [row.method for row in found.rows]
    assert {row["transfer"] for row in rows} == {"digits"}
    assert [float(row["value"]) for row in rows] == [row.value for row in found.rows]
    assert all(row["threads"] for row in rows)
    program.collect(root, file)
    assert list(csv.DictReader(file.open())) == rows


def test_steps_of_a_method_are_measured(toy, monkeypatch):
    root, config, _ = toy
    monkeypatch.setattr(cost, "settings", lambda *_: config)
    monkeypatch.setattr(cost, "STEPS", 2)
    monkeypatch.setattr(cost, "RANKED", 2)
    nothing = cost.measured(root, "digits", cost.NOTHING)
    found = cost.measured(root, "digits", "gps:k=2")
    assert found.keys() == nothing.keys() == set(cost.FIELDS) - set(cost.MACHINE)
    assert found["steps"] == 2
    assert float(found["step_ms"]) > 0
    assert found["peak_bytes"] > 0


def test_intervals_and_what_they_say():
    """Of 1, 2, 3 the mean is 2 and the deviation 1; Student's t for three values is 4.303."""
    assert page.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert page.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"
    assert page.verdict([1.0, 2.0, 3.0]) == "no difference that 3 seeds can tell (+2.0 ± 2.5 points)"
    assert page.verdict([-2.0, -2.1, -1.9]) == "worse by 2.0 ± 0.2 points"
    assert page.verdict([2.0, 2.1, 1.9]) == "better by 2.0 ± 0.2 points"
