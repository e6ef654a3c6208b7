"""``gradsel finetune``: from data and a pre-trained model to a trained, tested result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradsel.cli.running import is_first, run
from gradsel.errors import expected
from gradsel.training.config import Config, read_config


class Flag(NamedTuple):
    """A flag that sets one field of the configuration.

    Attributes:
        field: its dotted name, from which help and type come; options of methods and models have their own.
    """

    flag: str
    field: str
    help: str = ""
    kind: Any = None
    choices: tuple[str, ...] = ()
    several: bool = False


_DATA = (
    Flag("--data", "data.path"),
    Flag("--task", "data.task"),
    Flag("--kind", "data.kind"),
    Flag("--layout", "data.layout"),
    Flag("--root", "data.root"),
    Flag("--download", "data.download"),
    Flag("--validation", "data.validation"),
    Flag("--classes", "data.classes"),
    Flag("--image-column", "data.image_column"),
    Flag("--text-column", "data.text_columns", several=True),
    Flag("--label-column", "data.label_column"),
    Flag("--holdout", "data.holdout"),
    Flag("--validation-holdout", "data.validation_holdout"),
    Flag("--split-seed", "data.split_seed"),
    Flag("--image-size", "data.image_size"),
    Flag("--augmentation", "data.augmentation"),
    Flag("--selection-augmentation", "data.selection_augmentation"),
    Flag("--max-length", "data.max_length"),
    Flag("--workers", "data.workers"),
    Flag("--skip-unreadable", "data.skip_unreadable"),
)
_MODEL = (
    Flag("--model", "model.name"),
    Flag("--weights", "model.weights"),
    Flag("--drop-path", "model.drop_path"),
)
_METHOD = (
    Flag("--method", "method.name", "gps, grft, lora, ...; gradsel methods lists all; default: gps"),
    Flag("--k", "method.options.k", "gps: weights per neuron; default: 1", int),
    Flag("--rows", "method.options.rows", "grft: rows per matrix; default: 1", int),
    Flag(
        "--columns",
        "method.options.columns",
        "grft: columns per matrix, in place of rows; gps: inputs of a layer to choose from; paca: columns per layer",
        int,
    ),
    Flag("--sparse", "method.options.sparse", "grft: weights per neuron, in place of rows", int),
    Flag("--anchor", "method.options.anchor", "grft: strength of the pull towards the pre-trained weights", float),
    Flag("--anchor-blocks", "method.options.anchor_blocks", "grft: last blocks that are pulled; default: all"),
    Flag("--anchor-norm", "method.options.anchor_norm", "grft: norm of the pull, 1 or 2; default: 2", int),
    Flag("--subsets", "method.options.subsets", "grft: parts of the data of which the easiest selects", int),
    Flag(
        "--criterion",
        "method.options.criterion",
        "gps, grft: gradient, absolute, fisher, relative, snip, magnitude or random; default: gradient",
    ),
    Flag("--selection-loss", "method.options.loss", "gps, grft: contrastive or cross-entropy; default: contrastive"),
    Flag(
        "--scope",
        "method.options.scope",
        "gps: what competes for the same number of weights",
        choices=("neuron", "mass", "layer", "net"),
    ),
    Flag("--blocks", "method.options.blocks", "gps: numbers of the blocks to train", int, several=True),
    Flag("--skip-blocks", "method.options.skip_blocks", "gps: numbers of blocks to freeze", int, several=True),
    Flag("--ratio", "method.options.ratio", "gps: learning rate of the chosen weights by that of all else", float),
    Flag("--reselect", "method.options.reselect", "gps: epochs of training after which it selects again", int),
    Flag("--rank", "method.options.rank", "lora, shira, miss, spt-adapter, spt-lora: rank", int),
    Flag(
        "--alpha",
        "method.options.alpha",
        "lora: scale, default twice the rank; spt: what makes a matrix adapted",
        float,
    ),
    Flag("--dropout", "method.options.dropout", "lora: dropout", float),
    Flag("--layers", "method.options.layers", "lora: all, or attention (queries and values)"),
    Flag("--bottleneck", "method.options.bottleneck", "adapter: hidden width; default: a 64th of the width", int),
    Flag("--places", "method.options.places", "adapter: behind mlp, or both attention and mlp"),
    Flag("--prompts", "method.options.prompts", "vpt-shallow, vpt-deep: tokens; default: 200, 50 for each block", int),
    Flag("--budget", "method.options.budget", "spt-adapter, spt-lora: trained scalars besides the head", int),
    Flag("--sensitivity-batches", "method.options.batches", "spt-adapter, spt-lora: batches that are looked at", int),
)
_RECIPE = (
    Flag("--epochs", "recipe.epochs"),
    Flag("--batch-size", "recipe.batch_size"),
    Flag("--learning-rate", "recipe.learning_rate"),
    Flag("--warmup-epochs", "recipe.warmup_epochs"),
    Flag("--warmup", "recipe.warmup"),
    Flag("--first-learning-rate", "recipe.first_learning_rate"),
    Flag("--last-learning-rate", "recipe.last_learning_rate"),
    Flag("--optimizer", "recipe.optimizer"),
    Flag("--weight-decay", "recipe.weight_decay"),
    Flag("--label-smoothing", "recipe.label_smoothing"),
    Flag("--mixup", "recipe.mixup"),
    Flag("--cutmix", "recipe.cutmix"),
    Flag("--cooldown-epochs", "recipe.cooldown_epochs"),
    Flag("--ema", "recipe.ema"),
    Flag("--max-grad-norm", "recipe.max_grad_norm"),
    Flag("--accumulation", "recipe.accumulation"),
    Flag("--patience", "recipe.patience"),
)
_RUN = (
    Flag("--output", "output.folder"),
    Flag("--keep", "output.keep"),
    Flag("--save-steps", "output.save_steps"),
    Flag("--no-report", "output.report", "do not write report.html"),
    Flag("--tracking", "output.tracking", several=True),
    Flag("--seed", "seed"),
    Flag("--device", "device"),
    Flag("--precision", "precision"),
)
GROUPS = {"data": _DATA, "model": _MODEL, "method": _METHOD, "recipe": _RECIPE, "run": _RUN}


#: The flags that most commands have; the help shows them first.
FIRST = ("--data", "--model", "--method", "--k", "--epochs", "--learning-rate", "--output")


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser(
        "finetune", help=text,
        usage="gradsel finetune --data DATA --model MODEL --output FOLDER [option ...]\n"
        "       gradsel finetune --preset NAME --data DATA --output FOLDER [option ...]\n"
        "       gradsel finetune --config YAML --output FOLDER [option ...]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
    )  # fmt: skip
    first = parser.add_argument_group("first of all")
    for flags in GROUPS.values():
        for flag in flags:
            if flag.flag in FIRST:
                _add(first, flag)
    first.add_argument(
        "--preset",
        metavar="NAME",
        help="a paper's settings for a data set: gps/cub, grft/dtd; gradsel presets lists them; flags override them",
    )
    first.add_argument("--config", metavar="YAML", help="settings of an earlier run; flags override them")
    first.add_argument("--print-config", action="store_true", help="print the settings and do nothing")
    add_flags(parser, {title: [flag for flag in flags if flag.flag not in FIRST] for title, flags in GROUPS.items()})
    parser.set_defaults(command=_finetune)


def shared(*own: str) -> dict[str, list[Flag]]:
    """The flags of commands that make several runs, each with a method, and perhaps fields, of its own."""
    return {
        title: [flag for flag in flags if flag.field not in own] for title, flags in GROUPS.items() if title != "method"
    }


def add_flags(parser: argparse.ArgumentParser, groups: Mapping[str, Sequence[Flag]]) -> None:
    """Adds flags by the title of their group, and ``--model-option`` to those of the model."""
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag)
        if title == "model":
            group.add_argument(
                "--model-option", action="extend", nargs="+", default=[], metavar="NAME=VALUE",
                help="further arguments of timm.create_model, or of the configuration of transformers",
            )  # fmt: skip


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    text, kind, default, choices = _described(flag)
    if kind is bool:
        group.add_argument(flag.flag, dest=flag.field, default=None, help=text,
                           action="store_false" if flag.flag.startswith("--no-") else "store_true")  # fmt: skip
        return
    options: dict[str, Any] = {"nargs": "+"} if flag.several else {}
    shown = "" if default in (None, "", [], {}) or "default" in text else f"; default: {_shown(default)}"
    name = "{" + ",".join(choices) + "}" if choices else flag.flag.rpartition("-")[2].upper()
    group.add_argument(
        flag.flag, dest=flag.field, default=None, type=kind, help=text + shown,
        metavar={int: "N", float: "X"}.get(kind, name), **options,
    )  # fmt: skip


def _shown(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _described(flag: Flag) -> tuple[str, Any, Any, Sequence[str]]:
    """Help, type, default and choices of a flag."""
    import dataclasses
    import typing

    if flag.field.startswith("method.options."):
        return flag.help, flag.kind or str, None, flag.choices
    owner: Any = Config
    *path, name = flag.field.split(".")
    for part in path:
        owner = typing.get_type_hints(owner)[part]
    field = next(each for each in dataclasses.fields(owner) if each.name == name)
    hint = typing.get_type_hints(owner)[name]
    inner = (
        [each for each in typing.get_args(hint) if each is not type(None)]
        if type(None) in typing.get_args(hint)
        else [hint]
    )
    kind = inner[0] if inner[0] in (int, float, bool) else str
    text = flag.help or field.metadata["help"]
    choices = next((typing.get_args(each) for each in inner if typing.get_origin(each) is typing.Literal), ())
    default = None if field.default is dataclasses.MISSING else field.default
    return text, kind, default, choices


def config_of(arguments: argparse.Namespace) -> Config:
    """The settings that the flags say.

    Raises:
        ValueError: a setting does not exist or is out of range.
    """
    config = Config() if arguments.config is None else read_config(arguments.config)
    given = given_by(arguments, GROUPS)
    blocks = given.get("method.options.anchor_blocks")
    if blocks is not None and blocks.isdecimal():
        given["method.options.anchor_blocks"] = int(blocks)
    if given.get("method.name", config.method.name) != config.method.name:
        config = config.replaced({"method.options": {}})
    if arguments.preset is None:
        return _with_folder(config.replaced(given), given)
    from gradsel.training.presets import preset_settings

    found = preset_settings(arguments.preset)
    config = found.applied(config, {**given, "preset": arguments.preset})
    if is_first():
        print(f"preset {arguments.preset}: {found.source}", file=sys.stderr)
    if is_first() and (kept := [name for name in found.defaults if name not in given]):
        print(f"not published, so at their defaults: {', '.join(kept)}", file=sys.stderr)
    return _with_folder(config, given, arguments.preset)


def _with_folder(config: Config, given: Mapping[str, Any], preset: str = "") -> Config:
    """The configuration with a folder for the result, named after the preset, or after data and method."""
    named = config.output.folder or "output.folder" in given
    if named or not (preset or config.data.path or config.data.task != "classification"):
        return config
    name = (preset or f"{Path(config.data.name).stem}-{config.method.name}").replace("/", "-")
    return config.replaced({"output.folder": f"runs/{name}"})


def config_of_flags(arguments: argparse.Namespace, groups: Mapping[str, Sequence[Flag]]) -> Config:
    """The settings that some groups of flags say; all others have their defaults.

    Raises:
        ValueError: a setting does not exist or is out of range.
    """
    return Config().replaced(given_by(arguments, groups))


def given_by(arguments: argparse.Namespace, groups: Mapping[str, Sequence[Flag]]) -> dict[str, Any]:
    """The settings that were given, by their dotted names."""
    flags = [flag for own in groups.values() for flag in own]
    given = {flag.field: value for flag in flags if (value := getattr(arguments, flag.field)) is not None}
    for text in arguments.model_option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--model-option takes NAME=VALUE, got {text!r}")
        import yaml

        given[f"model.options.{name}"] = yaml.safe_load(value)
    return given


def _finetune(arguments: argparse.Namespace) -> int:
    def command() -> None:
        with expected():
            config = config_of(arguments)
            if arguments.print_config:
                print(config.to_yaml(), end="")
                return
            config.require()
        from gradsel.training import finetune

        finetune(config)

    return run("finetune", command)
