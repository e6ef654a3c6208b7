"""From an experiment to the configurations of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsel.experiments.comparing import Contestant
from gradsel.experiments.papers.experiment import Cell, Experiment
from gradsel.experiments.papers.sources import SOURCES
from gradsel.methods import METHODS
from gradsel.papers.presets import grft
from gradsel.ranking.policies import Columns, Rows
from gradsel.training.config import Config
from gradsel.training.presets import MODELS, preset_settings

#: Options of a run that are no settings of it, by what a measure needs them for.
_OF_MEASURES = ("shots", "number", "pull")
_RATE = "recipe.learning_rate"


def config_of(
    experiment: Experiment, cell: Cell, folder: Path, places: Mapping[str, Path], given: Mapping[str, Any]
) -> tuple[Config, str]:
    """The configuration of a run, and a note on what nobody published.

    Args:
        folder: for its result.
        places: the folders of the data sets by name.
        given: settings that override all others, by dotted names.

    Raises:
        ValueError: a setting does not exist or is out of range.
    """
    name, options = method_of(experiment, cell)
    model = experiment.models[cell.model]
    changes: dict[str, Any] = {"method.name": name, "model.name": MODELS.get(model, model)}
    if cell.data:
        changes |= SOURCES[cell.data].settings_in(places[cell.data])
    changes |= experiment.base
    changes |= {key: value for key, value in experiment.settings[cell.setting].items() if key not in _OF_MEASURES}
    changes |= {f"method.options.{key}": value for key, value in options.items()}
    changes |= given
    changes["seed"] = given.get("seed", 0) + cell.seed
    changes |= {"output.folder": str(folder), "output.report": False, "output.keep": 1}
    source = SOURCES[cell.data].preset if cell.data else ""
    if not source:
        return Config().replaced(changes), ""
    preset = preset_settings(f"{_paper(experiment, name)}/{source}")
    # The rate of a preset is that of its own method, on its own model.
    own, note = name == preset.values["method.name"], ""
    if _RATE not in changes and (preset.missing or not own):
        changes[_RATE] = METHODS[name].rate
        note = "the learning rate is the method's own" + (", as none is published" if preset.missing else "")
    return preset.applied(Config(), changes), note


def method_of(experiment: Experiment, cell: Cell) -> tuple[str, dict[str, Any]]:
    """The method of a run, and its options; those that it does not name are the preset's or the defaults."""
    text = experiment.methods[cell.method]
    name, *parts = text.split(":")
    kept = [part for part in parts if not part.endswith(("=preset", "=setting"))]
    given = Contestant.of(":".join([name, *kept])).how.options()
    options = {part.partition("=")[0]: given[part.partition("=")[0]] for part in kept}
    for part in parts:
        key, _, value = part.partition("=")
        if value == "preset":
            policy = grft(SOURCES[cell.data].preset).policy
            assert isinstance(policy, (Rows, Columns))
            options[key] = policy.k
        elif value == "setting":
            options[key] = experiment.settings[cell.setting]["number"]
    return name, options


def _paper(experiment: Experiment, name: str) -> str:
    """Whose preset a method is trained by: its own paper's, or the experiment's."""
    return name if name in ("gps", "grft") else experiment.paper
