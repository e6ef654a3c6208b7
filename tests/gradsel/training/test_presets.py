"""Presets as configurations: every one runs, or says which setting nobody published."""

from __future__ import annotations

import pytest
import timm

from gradsel.methods import method
from gradsel.papers.presets import GPS, GRFT
from gradsel.training import Config
from gradsel.training.presets import MODELS, preset_settings
from gradsel.training.recipe import Recipe

NAMES = [f"gps/{name}" for name in GPS] + [f"grft/{name}" for name in GRFT if name != "CIFAR-100"]
#: What somebody would pass for settings that are missing.
GIVEN = {"recipe.learning_rate": 1e-3, "recipe.batch_size": 32, "recipe.epochs": 100}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_makes_a_configuration(name):
    found = preset_settings(name)
    config = found.applied(Config(), {key: GIVEN[key] for key in found.missing})
    how = method(config.method.name, **config.method.options)
    recipe = Recipe(config.recipe, how, 10)
    assert recipe.epochs == config.recipe.epochs + (recipe.warmup_epochs if how.name == "grft" else 0)
    assert how.policy() == (GPS if how.name == "gps" else GRFT)[name.partition("/")[2]].policy
    for setting in found.missing:
        given = {key: GIVEN[key] for key in found.missing if key != setting}
        with pytest.raises(
            ValueError, match=f"nobody published: {setting}.*--{setting.split('.')[1].replace('_', '-')}"
        ):
            found.applied(Config(), given)


def test_gps_on_cub_as_published():
    config = preset_settings("gps/cub").applied(Config(), {"recipe.epochs": 3})
    recipe = config.recipe
    assert config.model.name == "timm/vit_base_patch16_224.augreg_in21k"
    assert config.method.options == {"k": 2}
    assert (recipe.learning_rate, recipe.batch_size, recipe.mixup, recipe.cutmix) == (3e-3, 32, 0.8, 1.0)
    assert (recipe.epochs, recipe.label_smoothing, recipe.first_learning_rate) == (3, 0.1, 1e-7)


def test_what_is_missing_says_what_is_known():
    assert preset_settings("gps/dtd").missing == {
        "recipe.learning_rate": "0.0003 to 0.01 over all data sets",
        "recipe.batch_size": "16 to 32 over all data sets",
    }
    assert not preset_settings("grft/cub").missing
    assert "recipe.mixup" in preset_settings("grft/cub").defaults


def test_the_models_exist():
    assert all(timm.is_model(name.removeprefix("timm/")) for name in MODELS.values() if name.startswith("timm/"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsp/cub", "gps/DATA-SET or grft/DATA-SET; did you mean gps"),
        ("gps", "gps/DATA-SET"),
        ("gps/cup", "GPS has no preset 'cup'"),
    ],
)
def test_an_unknown_preset_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        preset_settings(name)
