"""Configurations: YAML and back, and messages that name the field."""

from __future__ import annotations

import pytest

from gradsel.training import Config, DataConfig, read_config


def test_yaml_and_back(tmp_path):
    config = Config.from_dict(
        {
            "data": {"path": "birds", "text_columns": ["a", "b"]},
            "method": {"name": "grft", "options": {"rows": 3}},
            "recipe": {"learning_rate": 1e-3, "first_learning_rate": 1e-7},
        }
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert read_config(tmp_path / "run.yaml") == config


def test_numbers_that_yaml_takes_for_text(tmp_path):
    (tmp_path / "run.yaml").write_text("recipe: {learning_rate: 1e-3, epochs: 3, mixup: 1}")
    recipe = read_config(tmp_path / "run.yaml").recipe
    assert (recipe.learning_rate, recipe.epochs, recipe.mixup) == (1e-3, 3, 1.0)


def test_replaced_by_dotted_names():
    config = Config().replaced({"recipe.epochs": 3, "method.options.k": 2, "seed": 4})
    assert (config.recipe.epochs, config.method.options, config.seed) == (3, {"k": 2}, 4)
    assert Config().method.options == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": {"epoch": 3}}, "no setting recipe.epoch; did you mean epochs"),
        ({"recipes": {}}, "no setting recipes; did you mean recipe"),
        ({"recipe": 3}, "recipe must hold settings by name, got 3"),
        ({"recipe": {"epochs": "three"}}, "recipe.epochs must be an integer, got 'three'"),
        ({"recipe": {"epochs": True}}, "recipe.epochs must be an integer"),
        ({"recipe": {"epochs": 0}}, "recipe.epochs must be at least 1, got 0"),
        ({"recipe": {"learning_rate": 0}}, "recipe.learning_rate must be above 0"),
        ({"recipe": {"learning_rate": "fast"}}, "recipe.learning_rate must be a number, got 'fast'"),
        ({"recipe": {"label_smoothing": 1.0}}, "recipe.label_smoothing must be below 1"),
        ({"data": {"holdout": 1.0}}, "data.holdout must be below 1"),
        ({"data": {"kind": "image"}}, "data.kind is 'image'.*did you mean images"),
        ({"data": {"text_columns": "text"}}, "data.text_columns must be a list"),
        ({"data": {"path": 3}}, "data.path must be text"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"device": "gpu"}, "device is 'gpu', expected one of auto, cpu, cuda"),
    ],
)
def test_a_bad_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(values)


def test_dataclasses_are_checked_however_they_are_made():
    with pytest.raises(ValueError, match=r"data\.holdout must be above 0"):
        Config(data=DataConfig(holdout=0.0))
    with pytest.raises(ValueError, match="data must be a DataConfig"):
        Config(data={"path": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "run.yaml is not YAML"),
        ("- 1", "must hold settings by name"),
        ("seed: x", "run.yaml: seed"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="no configuration file"):
        read_config(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("name", "flag"), [("data.path", "--data"), ("model.name", "--model"), ("output.folder", "--output")]
)
def test_what_has_no_default_must_be_set(name, flag):
    given = {"data.path": "x", "model.name": "x", "output.folder": "x"}
    Config().replaced(given).require()
    with pytest.raises(ValueError, match=f"{name} is not set; pass {flag}"):
        Config().replaced({**given, name: ""}).require()
