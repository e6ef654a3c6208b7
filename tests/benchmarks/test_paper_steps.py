"""The benchmark of the papers' steps: what is measured once, and what the hours are made of."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")
from benchmarks.harness.results import load
from benchmarks.pages import papers as page
from benchmarks.papers import steps
from gradsel.experiments.papers import EXPERIMENTS


@pytest.fixture
def counted(monkeypatch):
    """Two experiments; a sample of a step takes a tenth of a second, but one method fits no model."""
    asked = []

    def step_seconds(config, classes, device):
        asked.append((config.model.name, config.method.name))
        if config.method.name == "lora":
            raise ValueError("no such layer")
        return 0.1 * config.recipe.batch_size

    chosen = {name: EXPERIMENTS[name] for name in ("gps/table2", "gps/fig4")}
    monkeypatch.setattr(steps, "EXPERIMENTS", chosen)
    monkeypatch.setattr(steps, "step_seconds", step_seconds)
    return asked


def test_every_model_and_method_is_measured_once_until_the_time_is_over(tmp_path, counted):
    file = tmp_path / steps.FILE.name
    count = len(EXPERIMENTS["gps/table2"].methods)
    assert steps.measure(file, seconds=0) == count
    assert not counted
    assert steps.measure(file, seconds=60) == 0
    assert len(counted) == len(set(counted)) == count
    assert steps.measure(file, seconds=60) == 0
    assert len(counted) == count
    unknown = [row for row in load(file) if row["unknown"]]
    assert [(row["method"], row["seconds_per_sample"], row["unknown"]) for row in unknown] == [
        ("lora", "", "no such layer")
    ]


def test_hours_are_seconds_times_samples(tmp_path, counted):
    file = tmp_path / steps.FILE.name
    steps.measure(file, seconds=60)
    runs, number, found = steps.hours(load(file))["gps/fig4"]
    loads = list(steps.alike(EXPERIMENTS["gps/fig4"], {}))
    assert (runs, number) == (len(loads), sum(load.steps for _, _, load in loads))
    samples = sum(config.recipe.batch_size * load.steps + load.tests / 3 for _, config, load in loads)
    assert found.hours == pytest.approx(0.1 * samples / 3600)
    assert not found.unknown
    partly = steps.hours(load(file))["gps/table2"][2]
    assert len(partly.unknown) == 1
    assert partly.unknown[0].endswith("LoRA (no such layer)")
    assert "without 1 method" in page.costs(tmp_path)
    rows = [row for row in load(file) if row["method"] != "gps"]
    assert steps.hours(rows)["gps/fig4"][2].unknown == ("ViT-B/16, GPS (not measured)",)
