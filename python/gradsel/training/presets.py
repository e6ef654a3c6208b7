"""The papers' settings as configurations of runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradsel.errors import did_you_mean
from gradsel.papers.presets import DATA_SETS, GPS, GRFT, GRFTPreset, Preset, gps, grft
from gradsel.ranking.policies import Columns, PerNeuron, Rows
from gradsel.training.config import Config

#: The models of the papers, by the names they have in :mod:`gradsel.papers`.
MODELS = {
    "vit-b-16": "timm/vit_base_patch16_224.augreg_in21k",
    "swin-b": "timm/swin_base_patch4_window7_224.ms_in22k",
    "convnext-b": "timm/convnext_base.fb_in22k",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
}
_PAPERS = {"gps": gps, "grft": grft}
#: The setting without which there is nothing to run; the others have defaults that work.
_REQUIRED = "recipe.learning_rate"
#: Fields of a preset by the settings that they are.
_SETTINGS = {
    "learning_rate": _REQUIRED,
    "batch_size": "recipe.batch_size",
    "epochs": "recipe.epochs",
    "warmup_epochs": "recipe.warmup_epochs",
    "cooldown_epochs": "recipe.cooldown_epochs",
    "ema": "recipe.ema",
    "first_learning_rate": "recipe.first_learning_rate",
    "last_learning_rate": "recipe.last_learning_rate",
    "weight_decay": "recipe.weight_decay",
    "label_smoothing": "recipe.label_smoothing",
    "mixup": "recipe.mixup",
    "cutmix": "recipe.cutmix",
    "drop_path": "model.drop_path",
    "augmentation": "data.augmentation",
    "selection_augmentation": "data.selection_augmentation",
}
#: Options of methods of which one excludes the others.
_WHAT = {f"method.options.{name}" for name in ("rows", "columns", "sparse")}
#: Settings that are nothing unless a paper says so, and those that texts have not.
_EXTRAS = {"ema", "cooldown_epochs"}
_OF_IMAGES = {"mixup", "cutmix", "drop_path", "augmentation", "selection_augmentation"}


@dataclass(frozen=True)
class PresetSettings:
    """What a preset says about a run.

    Attributes:
        values: settings by their dotted names.
        missing: the setting that a run needs and nobody published, if there is one.
        defaults: settings that nobody published, which keep their defaults.
        source: where the values are from; with what is unusual about them.
        classes: how many the data set has that the preset is for.
    """

    values: dict[str, Any]
    missing: str | None
    defaults: list[str]
    source: str
    classes: int

    def applied(self, config: Config, given: Mapping[str, Any]) -> Config:
        """A configuration with the preset's settings and then others, which override them.

        With another method, the options of the preset's own are left out, and the recipe stays. With another number of
        epochs, warm-up and cool-down keep their share of them.

        Args:
            given: settings by their dotted names.

        Raises:
            ValueError: neither has the setting that a run needs.
        """
        if self.missing is not None and self.missing not in given:
            flag = "--" + self.missing.rpartition(".")[2].replace("_", "-")
            raise ValueError(f"the preset lacks {self.missing}, which nobody published; pass {flag}")
        dropped = _WHAT if _WHAT & given.keys() else set()
        if given.get("method.name", self.values["method.name"]) != self.values["method.name"]:
            dropped = {name for name in self.values if name.startswith("method.options.")}
        values = {name: value for name, value in self.values.items() if name not in dropped}
        if (epochs := values.get("recipe.epochs")) is not None:
            share = given.get("recipe.epochs", epochs) / epochs
            values["recipe.warmup_epochs"] = values["recipe.warmup_epochs"] * share
            if "recipe.cooldown_epochs" in values:
                values["recipe.cooldown_epochs"] = round(values["recipe.cooldown_epochs"] * share)
        return config.replaced({"method.options": {}}).replaced({**values, **given})


def preset_settings(name: str) -> PresetSettings:
    """The settings of a preset.

    Args:
        name: ``gps/`` or ``grft/`` and a data set of :data:`gradsel.papers.presets.DATA_SETS` or an alias of one:
            ``gps/cub``.

    Raises:
        ValueError: there is no such preset.
    """
    paper, slash, data_set = name.partition("/")
    if not slash or paper not in _PAPERS:
        raise ValueError(f"preset {name!r} is not gps/DATA-SET or grft/DATA-SET{did_you_mean(paper, _PAPERS)}")
    try:
        preset: Preset = _PAPERS[paper](data_set)
    except KeyError:
        beginnings = {known[: len(name)]: known for known in preset_names() if known.startswith(f"{paper}/")}
        close = difflib.get_close_matches(name.lower(), beginnings, n=1, cutoff=0.75)
        hint = f"; did you mean {beginnings[close[0]]}?" if close else ""
        raise ValueError(f"preset: there is none called {name!r}{hint}; gradsel presets lists them") from None
    values: dict[str, Any] = {"method.name": paper, "model.name": MODELS[preset.model]}
    if preset.optimizer is not None:
        values["recipe.optimizer"] = preset.optimizer.lower()
    values |= _data_settings(preset)
    options = {f"method.options.{name}": value for name, value in _options(preset).items()}
    values |= {name: value for name, value in options.items() if value is not None}
    defaults = [name for name, value in options.items() if value is None]
    ignored = _OF_IMAGES if DATA_SETS[preset.data_set].benchmark == "GLUE" else set()
    for field, setting in _SETTINGS.items():
        value = getattr(preset, field)
        if value is not None:
            values[setting] = value
        elif setting not in values and setting != _REQUIRED and field not in (ignored | _EXTRAS):
            defaults.append(setting)
    missing = _REQUIRED if _REQUIRED not in values else None
    borrowed = "no augmentation, as in GPS" if preset.augmentation is None and "data.augmentation" in values else ""
    return PresetSettings(
        values, missing, defaults, "; ".join(filter(None, (preset.source, borrowed, preset.note))), preset.classes
    )  # fmt: skip


def preset_names() -> list[str]:
    """The names of all presets."""
    return [
        f"{paper}/{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
        for paper, presets in (("gps", GPS), ("grft", GRFT))
        for name in presets
    ]


def _data_settings(preset: Preset) -> dict[str, Any]:
    """Where a data set comes from, and how it is split, as far as the benchmark says it."""
    data_set = DATA_SETS[preset.data_set]
    if data_set.benchmark == "GLUE":
        return {"data.task": f"glue/{preset.data_set.lower()}"}
    if data_set.benchmark == "CIFAR":
        return {"data.path": "torchvision/CIFAR100"}
    if data_set.benchmark == "VTAB":
        # GRFT says nothing of augmentation; GPS has none here.
        return {"data.validation": "join", "data.classes": preset.classes, "data.augmentation": "none"}
    return {"data.validation": "join"}


def _options(preset: Preset) -> dict[str, Any]:
    """The options of the method; None where they are not known."""
    policy = preset.policy
    options: dict[str, Any] = {}
    if isinstance(policy, PerNeuron):
        options["k"] = policy.k
    elif isinstance(policy, (Rows, Columns)):
        options["rows" if isinstance(policy, Rows) else "columns"] = policy.k
    if isinstance(preset, GRFTPreset):
        options |= {
            "subsets": preset.data_subsets, "anchor": preset.anchor, "anchor_blocks": preset.regular_layers
        }  # fmt: skip
    return options
