"""Presets as configurations: every one reads data in its layout, or says which setting nobody published."""

from __future__ import annotations

import pytest
import timm
import torch

from gradsel.cli import main as cli
from gradsel.methods import method
from gradsel.papers.presets import DATA_SETS, GPS, GRFT
from gradsel.training import Config
from gradsel.training.data import read_data
from gradsel.training.datasets import Images, transforms
from gradsel.training.models import ImageInput
from gradsel.training.presets import MODELS, preset_names, preset_settings
from gradsel.training.recipe import Recipe
from tests.support import data_roots as roots
from tests.support import tiny

NAMES = [f"gps/{name}" for name in GPS] + [f"grft/{name}" for name in GRFT]
FGVC = {
    "CUB-200-2011": roots.cub,
    "NABirds": roots.nabirds,
    "Oxford Flowers": roots.flowers,
    "Stanford Dogs": roots.dogs,
    "Stanford Cars": roots.cars,
}
IMAGE = ImageInput((16, 16), (0.5,) * 3, (0.5,) * 3)


def preset_of(name):
    paper, _, data_set = name.partition("/")
    return {"gps": GPS, "grft": GRFT}[paper][data_set]


def given_for(preset, folder):
    """What somebody passes besides the preset: where the data are, and what nobody published."""
    benchmark = DATA_SETS[preset.data_set].benchmark
    if benchmark == "CIFAR":
        return {"data.root": str(roots.cifar(folder, "CIFAR100")), "recipe.learning_rate": 1e-3}
    if benchmark == "GLUE":
        return {"data.path": str(roots.glue(folder, preset.data_set.lower())), "recipe.learning_rate": 1e-3}
    write = FGVC.get(preset.data_set, lambda root: roots.vtab(root, preset.classes))
    return {"data.path": str(write(folder))}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_reads_data_in_its_layout_and_makes_a_recipe(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    preset, found = preset_of(name), preset_settings(name)
    given = given_for(preset, tmp_path / "data")
    config = found.applied(Config(), given)
    how = method(config.method.name, **config.method.options)
    assert how.policy() == preset.policy
    data = read_data(config.data)
    assert set(data.splits) == {"train", "test"}
    if DATA_SETS[preset.data_set].benchmark in ("VTAB", "CIFAR"):
        assert len(data.classes) == preset.classes
    recipe = Recipe(config.recipe, how, len(data.classes))
    assert recipe.rate == given.get("recipe.learning_rate", preset.learning_rate)
    extra = recipe.warmup_epochs if how.name == "grft" else config.recipe.cooldown_epochs
    assert recipe.epochs == config.recipe.epochs + extra
    if data.kind == "images":
        training, testing = transforms(IMAGE, config.data.augmentation)
        sample = Images(data.splits["train"], training)[0]["pixel_values"]
        assert sample.shape == Images(data.splits["test"], testing)[0]["pixel_values"].shape == (3, 16, 16)
        assert torch.isfinite(sample).all()


@pytest.mark.parametrize("name", [name for name in NAMES if preset_of(name).learning_rate is None])
def test_what_nobody_published_is_asked_for(name):
    found = preset_settings(name)
    with pytest.raises(ValueError, match=r"lacks recipe\.learning_rate, which nobody published; pass --learning-rate"):
        found.applied(Config(), {})
    assert found.applied(Config(), {"recipe.learning_rate": 0.1}).recipe.learning_rate == 0.1


def test_only_these_lack_a_setting():
    lacking = [name for name in NAMES if preset_settings(name).missing is not None]
    assert lacking == ["gps/CIFAR-100", "gps/CIFAR-100 (Swin)", "gps/CIFAR-100 (ConvNeXt)", "grft/CoLA", "grft/MRPC",
                       "grft/RTE"]  # fmt: skip


def test_gps_on_cub_as_published():
    found = preset_settings("gps/cub")
    config = found.applied(Config(), {"recipe.epochs": 3})
    recipe, data = config.recipe, config.data
    assert config.model.name == "timm/vit_base_patch16_224.augreg_in21k"
    assert config.method.options == {"k": 2}
    assert (recipe.learning_rate, recipe.batch_size, recipe.mixup, recipe.cutmix) == (3e-3, 32, 0.8, 1.0)
    assert (recipe.epochs, recipe.label_smoothing, recipe.first_learning_rate) == (3, 0.1, 1e-7)
    assert (recipe.ema, recipe.cooldown_epochs, recipe.warmup_epochs) == (0.9998, 0, 0.3)  # a tenth of 3 epochs
    recipe = found.applied(Config(), {"recipe.cooldown_epochs": 4}).recipe
    assert (recipe.epochs, recipe.cooldown_epochs, recipe.warmup_epochs) == (100, 4, 10)
    assert (data.augmentation, data.selection_augmentation, data.validation) == ("fgvc", "strong", "join")
    assert not found.defaults


def test_another_method_or_other_rows_on_the_same_recipe():
    found = preset_settings("grft/cub")
    config = found.applied(Config(), {"method.name": "full"})
    assert (config.method.name, config.method.options, config.recipe.learning_rate) == ("full", {}, 5e-3)
    options = found.applied(Config(), {"method.options.rows": 3}).method.options
    assert options == {"rows": 3, "subsets": 4, "anchor": 1e-3, "anchor_blocks": 2}


def test_what_a_paper_leaves_open_keeps_its_default():
    assert preset_settings("grft/cub").defaults == [
        "recipe.first_learning_rate", "recipe.last_learning_rate", "recipe.weight_decay", "recipe.label_smoothing",
        "recipe.mixup", "recipe.cutmix", "model.drop_path", "data.augmentation", "data.selection_augmentation",
    ]  # fmt: skip
    assert {"recipe.batch_size", "method.options.anchor"} < set(preset_settings("grft/rte").defaults)
    assert "recipe.mixup" not in preset_settings("grft/rte").defaults
    assert "no augmentation, as in GPS" in preset_settings("grft/svhn").source
    assert "as in GPS" not in preset_settings("grft/cub").source


@pytest.mark.parametrize("name", ["gps/cub", "grft/oxford-flowers"])
def test_a_preset_and_data_are_enough(name, tmp_path, monkeypatch, capsys):
    """The recipe itself, but for the size of the model and the number of epochs."""
    monkeypatch.chdir(tmp_path)
    write = roots.cub if name == "gps/cub" else roots.flowers
    smaller = ["--model", "vit_tiny_patch16_224", "--weights", "none"]
    smaller += [f"--model-option={key}={value}" for key, value in tiny.VIT.items()]
    code = cli.main(["finetune", "--preset", name, "--data", str(write(tmp_path / "data")), *smaller, "--epochs", "2"])
    printed = capsys.readouterr().err
    assert code == 0, printed
    assert f"preset {name}: " in printed
    assert (tmp_path / "runs" / name.replace("/", "-") / "report.html").exists()
    log = (tmp_path / "runs" / name.replace("/", "-") / "log.txt").read_text()
    assert "layout" in log
    assert f"warning: the preset {name} is for data with {preset_settings(name).classes} classes, these have " in log


def test_presets_are_listed(capsys):
    names = preset_names()
    assert len(set(names)) == len(names) == len(NAMES)
    for slug, name in zip(names, NAMES, strict=True):
        assert preset_settings(slug) == preset_settings(name)
    assert cli.main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:-1]] == names
    assert cli.main(["presets", "gps/cifar-100"]) == 0
    assert "not published, to be passed: recipe.learning_rate" in capsys.readouterr().out
    assert cli.main(["presets", "gps/cup"]) == 1


def test_the_models_exist():
    assert all(timm.is_model(name.removeprefix("timm/")) for name in MODELS.values() if name.startswith("timm/"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsp/cub", "gps/DATA-SET or grft/DATA-SET; did you mean gps"),
        ("gps", "gps/DATA-SET"),
        ("gps/cup", r"preset: there is none called 'gps/cup'; did you mean gps/cub-200-2011\?; gradsel presets"),
        ("grft/qqq", "preset: there is none called 'grft/qqq'; gradsel presets lists them"),
    ],
)
def test_an_unknown_preset_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        preset_settings(name)
