"""The papers' settings as configurations of runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradsel.papers.presets import DATA_SETS, Between, GRFTPreset, Preset, gps, grft
from gradsel.parameters.names import did_you_mean
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
#: Fields of a preset by the settings that they are; without the first ones there is nothing to run.
_REQUIRED = {"learning_rate": "recipe.learning_rate", "batch_size": "recipe.batch_size", "epochs": "recipe.epochs"}
_OTHERS = {
    "warmup_epochs": "recipe.warmup_epochs",
    "first_learning_rate": "recipe.first_learning_rate",
    "last_learning_rate": "recipe.last_learning_rate",
    "weight_decay": "recipe.weight_decay",
    "label_smoothing": "recipe.label_smoothing",
    "mixup": "recipe.mixup",
    "cutmix": "recipe.cutmix",
    "drop_path": "model.drop_path",
}


@dataclass(frozen=True)
class PresetSettings:
    """What a preset says about a run.

    Attributes:
        values: settings by their dotted names.
        missing: settings that a run needs and nobody published, with what is known of them.
        defaults: settings that nobody published, which keep their defaults.
        source: where the values are from; with what is unusual about them.
    """

    values: dict[str, Any]
    missing: dict[str, str]
    defaults: list[str]
    source: str

    def applied(self, config: Config, given: Mapping[str, Any]) -> Config:
        """A configuration with the preset's settings and then others, which override them.

        Args:
            given: settings by their dotted names.

        Raises:
            ValueError: neither has what a run needs.
        """
        if lacking := [name for name in self.missing if name not in given]:
            told = "; ".join(f"{name} ({self.missing[name]})" for name in lacking)
            flags = " ".join(f"--{name.rpartition('.')[2].replace('_', '-')}" for name in lacking)
            raise ValueError(f"the preset lacks what nobody published: {told}; pass {flags}")
        return config.replaced({"method.options": {}}).replaced({**self.values, **given})


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
    except KeyError as error:
        raise ValueError(f"preset: {error}") from None
    values: dict[str, Any] = {"method.name": paper, "model.name": MODELS[preset.model]}
    if preset.optimizer is not None:
        values["recipe.optimizer"] = preset.optimizer.lower()
    if DATA_SETS[preset.data_set].benchmark == "VTAB":
        values["data.augmentation"] = "none"
    values |= {f"method.options.{name}": value for name, value in _options(preset).items()}
    missing, defaults = {}, []
    for field, setting in {**_REQUIRED, **_OTHERS}.items():
        value = getattr(preset, field)
        if value is not None and not isinstance(value, Between):
            values[setting] = value
        elif field in _REQUIRED:
            missing[setting] = "not published" if value is None else f"{value} over all data sets"
        else:
            defaults.append(setting)
    return PresetSettings(values, missing, defaults, preset.source + (f"; {preset.note}" if preset.note else ""))


def _options(preset: Preset) -> dict[str, Any]:
    policy = preset.policy
    options: dict[str, Any] = {}
    if isinstance(policy, PerNeuron):
        options["k"] = policy.k
    elif isinstance(policy, (Rows, Columns)):
        options["rows" if isinstance(policy, Rows) else "columns"] = policy.k
    if isinstance(preset, GRFTPreset):
        known = {"subsets": preset.data_subsets, "anchor": preset.anchor, "anchor_blocks": preset.regular_layers}
        options |= {name: value for name, value in known.items() if value is not None}
    return options
