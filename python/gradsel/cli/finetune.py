"""``gradsel finetune``: from data and a pre-trained model to a trained, tested result."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

from gradsel.cli.running import run
from gradsel.training.config import Config, read_config

_EXAMPLES = """
examples:
  gradsel finetune --preset gps/cub --data CUB/ --output runs/cub
  gradsel finetune --data birds/ --model timm/vit_base_patch16_224.augreg_in21k --method gps --k 1 --output runs/birds
  gradsel finetune --data reviews.csv --model distilbert/distilbert-base-uncased --method grft --output runs/reviews
  gradsel finetune --config runs/birds/config.yaml --seed 1 --output runs/birds-1
"""


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
    Flag("--kind", "data.kind"),
    Flag("--text-column", "data.text_columns", several=True),
    Flag("--label-column", "data.label_column"),
    Flag("--holdout", "data.holdout"),
    Flag("--image-size", "data.image_size"),
    Flag("--augmentation", "data.augmentation"),
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
    Flag("--method", "method.name", "gps, grft, full, linear, bias or lora; default: gps"),
    Flag("--k", "method.options.k", "gps: weights per neuron; default: 1", int),
    Flag("--rows", "method.options.rows", "grft: rows per matrix; default: 1", int),
    Flag(
        "--columns",
        "method.options.columns",
        "grft: columns per matrix, in place of rows; gps: inputs of a layer to choose from",
        int,
    ),
    Flag("--sparse", "method.options.sparse", "grft: weights per neuron, in place of rows", int),
    Flag("--anchor", "method.options.anchor", "grft: strength of the pull towards the pre-trained weights", float),
    Flag("--anchor-blocks", "method.options.anchor_blocks", "grft: last blocks that are pulled; default: all"),
    Flag("--subsets", "method.options.subsets", "grft: parts of the data of which the easiest selects", int),
    Flag("--criterion", "method.options.criterion", "gps, grft: gradient, absolute, fisher, snip, magnitude or random"),
    Flag("--selection-loss", "method.options.loss", "gps, grft: contrastive or cross-entropy"),
    Flag("--rank", "method.options.rank", "lora: rank; default: 8", int),
    Flag("--alpha", "method.options.alpha", "lora: scale; default: twice the rank", float),
    Flag("--dropout", "method.options.dropout", "lora: dropout", float),
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


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser(
        "finetune", help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", help="settings of an earlier run; flags override them")
    parser.add_argument(
        "--preset", metavar="NAME", help="a paper's settings for a data set: gps/cub, grft/rte; flags override them"
    )
    parser.add_argument("--print-config", action="store_true", help="print the settings and do nothing")
    parser.add_argument(
        "--model-option", action="append", default=[], metavar="NAME=VALUE",
        help="a further argument of timm.create_model, or of the configuration of transformers",
    )  # fmt: skip
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag)
    parser.set_defaults(command=_finetune)


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    text, kind, default = _described(flag)
    if kind is bool:
        group.add_argument(flag.flag, dest=flag.field, default=None, help=text,
                           action="store_false" if flag.flag.startswith("--no-") else "store_true")  # fmt: skip
        return
    options: dict[str, Any] = {"nargs": "+"} if flag.several else {}
    shown = "" if default in (None, "", [], {}) or "default" in text else f"; default: {default}"
    group.add_argument(
        flag.flag, dest=flag.field, default=None, type=kind, help=text + shown,
        metavar={int: "N", float: "X"}.get(kind, flag.flag.rpartition("-")[2].upper()), **options,
    )  # fmt: skip


def _described(flag: Flag) -> tuple[str, Any, Any]:
    """Help, type and default of a flag."""
    import dataclasses
    import typing

    if flag.field.startswith("method.options."):
        return flag.help, flag.kind or str, None
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
    if choices:
        text += f" ({', '.join(choices)})"
    default = None if field.default is dataclasses.MISSING else field.default
    return text, kind, default


def config_of(arguments: argparse.Namespace) -> Config:
    """The settings that the flags say.

    Raises:
        ValueError: a setting does not exist or is out of range.
    """
    config = Config() if arguments.config is None else read_config(arguments.config)
    given = {
        flag.field: getattr(arguments, flag.field)
        for flags in GROUPS.values()
        for flag in flags
        if getattr(arguments, flag.field) is not None
    }
    blocks = given.get("method.options.anchor_blocks")
    if blocks is not None and blocks.isdecimal():
        given["method.options.anchor_blocks"] = int(blocks)
    if given.get("method.name", config.method.name) != config.method.name:
        config = config.replaced({"method.options": {}})
    for text in arguments.model_option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--model-option takes NAME=VALUE, got {text!r}")
        import yaml

        given[f"model.options.{name}"] = yaml.safe_load(value)
    if arguments.preset is None:
        return config.replaced(given)
    from gradsel.training.presets import preset_settings

    found = preset_settings(arguments.preset)
    print(f"preset {arguments.preset}: {found.source}", file=sys.stderr)
    if kept := [name for name in found.defaults if name not in given]:
        print(f"not published, so at their defaults: {', '.join(kept)}", file=sys.stderr)
    return found.applied(config, given)


def _finetune(arguments: argparse.Namespace) -> int:
    def command() -> None:
        config = config_of(arguments)
        if arguments.print_config:
            print(config.to_yaml(), end="")
            return
        config.require()
        from gradsel.training import finetune

        finetune(config)

    return run("finetune", command)
