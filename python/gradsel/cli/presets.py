"""``gradsel presets``: the papers' settings that ``gradsel finetune --preset`` takes."""

from __future__ import annotations

import argparse

from gradsel.cli.running import run
from gradsel.errors import expected
from gradsel.tables import table

_COLUMNS = {
    "rate": "recipe.learning_rate",
    "batch": "recipe.batch_size",
    "epochs": "recipe.epochs",
    "drop path": "model.drop_path",
    "mixup": "recipe.mixup",
    "average": "recipe.ema",
    "augmentation": "data.augmentation",
}


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("presets", help=text)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset, to see all that it sets: gps/cub")
    parser.set_defaults(command=_presets)


def _presets(arguments: argparse.Namespace) -> int:
    def command() -> None:
        from gradsel.training.presets import preset_names, preset_settings

        if arguments.name is None:
            rows = []
            for name in preset_names():
                values = preset_settings(name).values
                options = [f"{key.rpartition('.')[2]}={value}" for key, value in values.items() if ".options." in key]
                rows.append((name, *(f"{values.get(key, '-')}" for key in _COLUMNS.values()), " ".join(options)))
            print("\n".join(table(("preset", *_COLUMNS, "method"), rows)))
            print("-: nobody published it. gradsel presets NAME shows all settings of one, and their source.")
            return
        with expected():
            found = preset_settings(arguments.name)
        print(found.source)
        for name, value in found.values.items():
            print(f"{name}: {value}")
        if found.missing is not None:
            print(f"not published, to be passed: {found.missing}")
        if found.defaults:
            print(f"not published, at their defaults: {', '.join(found.defaults)}")

    return run("presets", command)
