"""The benchmark of the Trainer's overhead: what it compares is the same work, and how ratios are taken."""

from __future__ import annotations

import pytest

from benchmarks.training import overhead


def test_every_step_of_the_trainer_has_one_of_the_bare_loop():
    (make, batch, _), *_ = overhead.SMALL.values()
    seconds = overhead.step_times(make, batch(), rounds=2)
    assert {name: len(values) for name, values in seconds.items()} == {"bare loop": 2, "Trainer": 2}
    assert all(value > 0 for values in seconds.values() for value in values)


def test_ratios_are_medians_over_pairs(capsys):
    """The third round was slow for both, which changes the ratio of no pair."""
    found = overhead.rows("training step", "x", {"a": [1.0, 1.0, 9.0], "b": [2.0, 2.1, 18.0]}, "at most 3", 1.0)
    assert [(row["provider"], row["baseline"], float(row["ratio"]), row["goal"]) for row in found] == [
        ("a", "a", 1.0, ""),
        ("b", "a", pytest.approx(2.0), "at most 3"),
    ]
    assert set(found[0]) == set(overhead.FIELDS)
