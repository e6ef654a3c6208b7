"""The papers' settings: what their tables print, and nothing that the papers leave open."""

from __future__ import annotations

import dataclasses
import re

import pytest

from gradsel import Columns, PerNeuron, Rows
from gradsel.papers import counting, presets


def test_gps_of_one_data_set_is_complete():
    preset = presets.gps("cub-2011")
    assert preset is presets.GPS["CUB-200-2011"]
    assert dataclasses.asdict(preset) == {
        "method": "GPS",
        "data_set": "CUB-200-2011",
        "model": "vit-b-16",
        "policy": {"k": 2, "columns": None},
        "scripts_policy": {"k": 2, "columns": None},
        "source": "GPS, Tab. 7 and section 4.1, and the authors' scripts (github.com/FightingFighting/GPS)",
        "note": "",
        "optimizer": "Adam",
        "learning_rate": 3e-3,
        "first_learning_rate": 1e-7,
        "last_learning_rate": 1e-8,
        "batch_size": 32,
        "epochs": 100,
        "warmup_epochs": 10,
        "cooldown_epochs": 10,
        "ema": 0.9998,
        "weight_decay": 0.0,
        "drop_path": 0.0,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "augmentation": "fgvc",
        "selection_augmentation": "strong",
    }
    assert preset.policy == PerNeuron(2)
    assert preset.classes == 200


def test_grft_of_one_data_set_is_complete():
    preset = presets.grft("svhn")
    assert preset is presets.GRFT["SVHN"]
    assert dataclasses.asdict(preset) == {
        "method": "GRFT",
        "data_set": "SVHN",
        "model": "vit-b-16",
        "policy": {"k": 4},
        "source": "GRFT, Tab. 7 and section 4.1; rows or columns by Tab. 8",
        "note": "",
        "optimizer": "Adam",
        "learning_rate": 5e-3,
        "first_learning_rate": None,
        "last_learning_rate": None,
        "batch_size": 32,
        "epochs": 100,
        "warmup_epochs": 10,
        "cooldown_epochs": None,
        "ema": None,
        "weight_decay": None,
        "drop_path": None,
        "mixup": None,
        "cutmix": None,
        "label_smoothing": None,
        "augmentation": None,
        "selection_augmentation": None,
        "data_subsets": 1,
        "anchor": 1e-3,
        "regular_layers": 1,
    }
    assert preset.policy == Rows(4)
    assert preset.classes == 10


@pytest.mark.parametrize(
    ("name", "printed", "scripts", "learning_rate", "batch_size", "drop_path", "ema"),
    [
        ("cub", 2, 2, 3e-3, 32, 0.0, 0.9998),
        ("nabirds", 10, 20, 1e-4, 32, 0.1, 0.9998),
        ("oxford flowers", 1, 1, 1e-3, 32, 0.1, 0.99),
        ("stanford dogs", 1, 1, 1e-4, 64, 0.0, 0.9998),
        ("stanford cars", 10, 15, 5e-4, 32, 0.0, 0.9998),
    ],
)
def test_gps_names_the_papers_k_and_that_of_the_scripts(
    name, printed, scripts, learning_rate, batch_size, drop_path, ema
):
    preset = presets.gps(name)
    assert preset.policy == PerNeuron(printed)
    assert preset.scripts_policy == PerNeuron(scripts)
    assert (preset.learning_rate, preset.batch_size, preset.drop_path) == (learning_rate, batch_size, drop_path)
    assert (preset.mixup, preset.cutmix, preset.label_smoothing, preset.ema) == (0.8, 1.0, 0.1, ema)
    assert bool(preset.note) == (printed != scripts)


@pytest.mark.parametrize(
    ("name", "learning_rate", "batch_size", "drop_path"),
    [
        ("svhn", 5e-3, 32, 0.0),
        ("dsprites-loc", 7e-3, 32, 0.0),
        ("vtab cifar-100", 1e-2, 32, 0.0),
        ("clevr-count", 3e-4, 16, 0.1),
        ("clevr_dist", 2e-3, 16, 0.1),
        ("diabetic_retinopathy", 2e-3, 32, 0.2),
        ("dmlab", 1.5e-3, 16, 0.1),
        ("sun397", 2.5e-3, 16, 0.0),
        ("oxford_iiit_pet", 3e-3, 32, 0.0),
        ("smallnorb_ele", 3e-4, 32, 0.2),
    ],
)
def test_gps_on_vtab_as_in_the_scripts(name, learning_rate, batch_size, drop_path):
    preset = presets.gps(name)
    assert (preset.learning_rate, preset.batch_size, preset.drop_path) == (learning_rate, batch_size, drop_path)


def test_gps_on_vtab_neither_mixes_nor_augments():
    vtab = [preset for preset in presets.GPS.values() if presets.DATA_SETS[preset.data_set].benchmark == "VTAB"]
    assert len(vtab) == 19
    for preset in vtab:
        assert 3e-4 <= preset.learning_rate <= 1e-2  # the ranges that GPS prints
        assert preset.batch_size in (16, 32)
        assert preset.policy == preset.scripts_policy == PerNeuron(2 if preset.data_set == "Patch Camelyon" else 1)
        assert (preset.mixup, preset.cutmix, preset.label_smoothing, preset.ema) == (0.0, 0.0, 0.0, None)
        assert (preset.augmentation, preset.selection_augmentation) == ("none", "strong")


def test_gps_on_the_whole_cifar_100_leaves_the_unknown_open():
    for name, model in (
        ("CIFAR-100", "vit-b-16"),
        ("CIFAR-100 (Swin)", "swin-b"),
        ("CIFAR-100 (ConvNeXt)", "convnext-b"),
    ):
        preset = presets.gps(name)
        assert (preset.model, preset.policy, preset.classes) == (model, PerNeuron(5), 100)
        assert (preset.learning_rate, preset.batch_size, preset.drop_path, preset.scripts_policy) == (None,) * 4


@pytest.mark.parametrize(
    ("name", "learning_rate", "batch_size", "data_subsets", "anchor", "regular_layers", "policy"),
    [
        ("CUB-2011", 5e-3, 32, 4, 1e-3, 2, Columns(2)),
        ("NaBirds", 1e-4, 32, 1, 1e-4, 7, Rows(26)),
        ("Oxford Flowers", 1e-3, 32, 1, 1e-4, 2, Rows(1)),
        ("Stan. Dogs", 2e-4, 64, 2, 5e-5, 4, Rows(5)),
        ("Stan. Cars", 5e-4, 32, 7, 1e-4, "all", Columns(20)),
        ("CIFAR-100", 2e-3, 32, 1, 1e-6, "all", Rows(1)),
        ("Sun397", 2.5e-3, 16, 1, 1e-6, 2, Rows(1)),
        ("Clevr/count", 3e-4, 16, 1, 0.0, 0, Rows(3)),
        ("DMLab", 1.5e-3, 16, 1, 0.0, 0, Columns(2)),
        ("dSprites/ori", 5e-4, 16, 1, 0.0, 0, Columns(2)),
        ("SmallNORB/ele", 3e-4, 32, 1, 1e-3, 2, Columns(2)),
    ],
)
def test_grft_as_printed(name, learning_rate, batch_size, data_subsets, anchor, regular_layers, policy):
    preset = presets.grft(name)
    assert (preset.learning_rate, preset.batch_size, preset.data_subsets) == (learning_rate, batch_size, data_subsets)
    assert (preset.anchor, preset.regular_layers, preset.policy) == (anchor, regular_layers, policy)


def test_grft_on_glue_is_a_language_model_with_little_known():
    for name in ("cola", "mrpc", "rte"):
        preset = presets.grft(name)
        assert (preset.model, preset.classes, preset.policy) == ("llama-3.2-1b", 2, Rows(3))
        assert preset.optimizer == "AdamW"
        for field in ("learning_rate", "batch_size", "epochs", "data_subsets", "anchor", "regular_layers"):
            assert getattr(preset, field) is None


@pytest.mark.parametrize("table", [presets.GPS, presets.GRFT])
def test_every_preset_has_a_source_a_model_and_a_known_data_set(table):
    assert len(table) == 27
    for preset in table.values():
        assert preset.source.startswith(preset.method)
        assert preset.model in counting.MODELS
        assert preset.data_set in presets.DATA_SETS
        with pytest.raises(dataclasses.FrozenInstanceError):
            preset.epochs = 1


@pytest.mark.parametrize(
    ("look_up", "name", "data_set"),
    [
        (presets.gps, "CUB_200_2011", "CUB-200-2011"),
        (presets.gps, "  na birds", "NABirds"),
        (presets.gps, "cars", "Stanford Cars"),
        (presets.gps, "smallnorb-azi", "SmallNORB/azimuth"),
        (presets.gps, "dsprites_location", "dSprites/location"),
        (presets.gps, "camelyon", "Patch Camelyon"),
        (presets.gps, "cifar100", "CIFAR-100"),
        (presets.gps, "vtab-cifar-100", "CIFAR-100 (VTAB)"),
        (presets.grft, "cifar100", "CIFAR-100 (VTAB)"),
    ],
)
def test_names_are_forgiving(look_up, name, data_set):
    assert look_up(name).data_set == data_set


def test_no_name_stands_for_two_data_sets():
    """A shorter alias must not hide another data set."""
    for look_up, table in ((presets.gps, presets.GPS), (presets.grft, presets.GRFT)):
        for key, preset in table.items():
            assert look_up(key) is preset
            for alias in presets.DATA_SETS[key].aliases if key in presets.DATA_SETS else ():
                assert look_up(alias) is preset


def test_an_unknown_name_suggests_and_lists():
    with pytest.raises(KeyError) as caught:
        presets.gps("NABird")
    message = str(caught.value)
    assert re.search(r"GPS .*'NABird'.*NABirds\?.*CUB-200-2011, NABirds, .*CIFAR-100 \(ConvNeXt\)$", message)
    with pytest.raises(KeyError, match="Oxford Flowers, Flowers102"):
        presets.grft("flowers")
    with pytest.raises(KeyError, match=r"^GRFT .*'iNaturalist'; it has CUB"):
        presets.grft("iNaturalist")
    with pytest.raises(KeyError, match=r"^GRFT .*''; it has CUB"):
        presets.grft("")
