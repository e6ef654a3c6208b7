"""The settings of a run: a tree of dataclasses, as YAML and back, checked field by field."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gradsel.errors import did_you_mean, one_line

PathLike = str | os.PathLike[str]
#: The settings in the folder of a run.
CONFIG = "config.yaml"


def setting(default: Any, help: str, **bounds: float) -> Any:
    """A field with what ``--help`` says about it.

    Args:
        bounds: ``low`` (included), ``above``, ``below`` (both excluded).
    """
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and test on."""

    path: str = setting(
        "", "folder of images, a table (csv, jsonl, parquet) or a folder of them, torchvision/NAME or hf/NAME"
    )
    task: Literal["classification", "segmentation", "glue/cola", "glue/mrpc", "glue/rte"] = setting(
        "classification", "what is learnt; tasks of GLUE are fetched from the hub unless --data has their files"
    )
    kind: Literal["auto", "images", "texts"] = setting("auto", "what the data are")
    layout: Literal["auto", "folder", "cub", "nabirds", "flowers", "dogs", "cars", "vtab", "vpt"] = setting(
        "auto", "how a folder of images is laid out; default: found by its files"
    )
    root: str | None = setting(None, "folder of torchvision's data sets")
    download: bool = setting(False, "let torchvision fetch the data set to the folder --root")
    validation: Literal["use", "join"] = setting(
        "use", "of a validation set that the data have: it chooses the best epoch, or joins training as in the papers"
    )
    classes: int | None = setting(None, "how many, where labels are numbers; default: as the labels say", low=2)
    image_column: str | None = setting(None, "the column with images or their paths; default: found by its name")
    text_columns: list[str] | None = setting(None, "one or two columns with the texts; default: found by their names")
    label_column: str | None = setting(None, "the column with the class; default: found by its name")
    holdout: float = setting(
        0.2, "fraction of each class held out for testing, where the data have no test set", above=0, below=1
    )
    validation_holdout: float | None = setting(
        None, "fraction of each class of the training set kept for validation, where the data have no such set; "
        "default: none", above=0, below=1,
    )  # fmt: skip
    split_seed: int | None = setting(None, "seed of what is held out or kept; default: that of the run")
    image_size: int | None = setting(None, "height and width of the input; default: the model's", low=1)
    augmentation: Literal["crop", "fgvc", "randaugment", "flip", "none"] = setting(
        "crop",
        "of training images: crop, crops of at least half of the area and flips; fgvc, smaller crops, as papers do on "
        "FGVC; randaugment, also RandAugment and erased patches, as in SSF; flip; none. flip and none resize without "
        "cropping",
    )
    selection_augmentation: Literal["same", "strong"] = setting(
        "same", "of images that weights are ranked on: that of training, or two views with crops, flips and colours"
    )
    max_length: int = setting(128, "tokens after which texts are cut", low=1)
    workers: int = setting(0, "processes that load images", low=0)
    skip_unreadable: bool = setting(False, "leave missing and unreadable images out instead of stopping")

    @property
    def name(self) -> str:
        """What the data are called."""
        return Path(self.path).name or self.task


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What to fine-tune."""

    name: str = setting("", "timm/NAME, a name of timm, or an id or local folder of transformers (or timm)")
    weights: Literal["pretrained", "none"] = setting("pretrained", "none: random weights, which need no download")
    drop_path: float = setting(0.0, "the largest probability of dropping a residual branch", low=0, below=1)
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further arguments of timm.create_model or of the configuration"}
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How to fine-tune it; ``gradsel methods`` lists methods and their options."""

    name: str = setting("gps", "the method")
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "the options of the method"})


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The optimization."""

    epochs: int = setting(20, "passes over the training data", low=1)
    batch_size: int = setting(32, "samples per batch, all processes together", low=1)
    learning_rate: float | None = setting(None, "the peak; default: the method's starting point", above=0)
    warmup_epochs: float | None = setting(None, "epochs with a rising rate; default: a tenth of the epochs", low=0)
    warmup: Literal["inside", "before"] | None = setting(
        None,
        "whether they are among the epochs (as in GPS) or precede them (as in GRFT); default: as in the method's paper",
    )
    first_learning_rate: float = setting(1e-7, "the rate at which warm-up begins", low=0)
    last_learning_rate: float = setting(1e-8, "the rate at which the cosine ends", low=0)
    optimizer: Literal["adam", "adamw"] = setting("adam", "adamw: decoupled weight decay")
    weight_decay: float = setting(0.0, "decay of what is trained", low=0)
    label_smoothing: float = setting(0.0, "fraction of the target spread over all classes", low=0, below=1)
    mixup: float = setting(0.0, "alpha of mixup; images only", low=0)
    cutmix: float = setting(0.0, "alpha of cutmix; images only", low=0)
    cooldown_epochs: int = setting(0, "epochs at the last rate after the others", low=0)
    ema: float | None = setting(
        None, "decay of an average of what is trained, which is tested and saved; default: none", above=0, below=1
    )
    max_grad_norm: float = setting(0.0, "largest norm of the gradient; 0: not clipped", low=0)
    accumulation: int = setting(1, "batches per step of the optimizer", low=1)
    patience: int | None = setting(None, "epochs without improvement on the validation set before stopping", low=1)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written."""

    folder: str = setting("", "a new folder for the result; default: runs/ and the preset, or data and method")
    keep: int = setting(2, "checkpoints to keep, the best included", low=1)
    save_steps: int | None = setting(None, "steps between checkpoints; default: one after every epoch", low=1)
    report: bool = setting(True, "write report.html")
    tracking: list[str] = field(
        default_factory=list, metadata={"help": "where to log besides the folder: tensorboard, wandb, ..."}
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, from data to result."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    preset: str = setting("", "the preset that the settings are from, whose number of classes the data should have")
    seed: int = setting(0, "of everything random", low=0, below=2**31)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one")
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "of matrix products")

    def __post_init__(self) -> None:
        for given in fields(self):
            value = getattr(self, given.name)
            if dataclasses.is_dataclass(value):
                _check(value, f"{given.name}.")
        _check(self, "")

    def require(self) -> None:
        """Checks that what has no default is set.

        Raises:
            ValueError: it is not.
        """
        flags = {"data.path": "--data", "model.name": "--model", "output.folder": "--output"}
        for name, flag in flags.items():
            if name == "data.path" and self.data.task.startswith("glue/"):
                continue  # fetched from the hub
            part, _, short = name.partition(".")
            if not getattr(getattr(self, part), short):
                raise ValueError(f"{name} is not set; pass {flag}")

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries, lists, strings and numbers."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`; what is left out has its default.

        Raises:
            ValueError: a field does not exist, or has a value of another type or out of range; the message names it.
        """
        found: Config = _made(Config, values, "")
        return found

    def replaced(self, changes: Mapping[str, Any]) -> Config:
        """A copy with other values, by dotted names: ``{"recipe.epochs": 3, "method.options.k": 2}``.

        Raises:
            ValueError: as from :meth:`from_dict`.
        """
        values = self.to_dict()
        for name, value in changes.items():
            place, parts = values, name.split(".")
            for part in parts[:-1]:
                place = place.setdefault(part, {})
            place[parts[-1]] = value
        return Config.from_dict(values)

    def to_yaml(self) -> str:
        """The text of a configuration file that repeats the run."""
        import yaml

        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def read_config(path: PathLike) -> Config:
    """Reads a configuration file in YAML.

    Raises:
        ValueError: it is not valid; the message names file and field.
    """
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"there is no configuration file {path}")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold settings by name, got {type(values).__name__}")
    try:
        return Config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def run_in(folder: PathLike) -> tuple[Path, Config]:
    """The folder of a run, finished or not, and its settings.

    Raises:
        ValueError: there is no run in it.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no run of gradsel: there is no {CONFIG} in it")
    return folder, read_config(folder / CONFIG)


def _made(kind: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.removesuffix('.')} must hold settings by name, got {values!r}")
    hints, known = _types(kind), [each.name for each in fields(kind)]
    given = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"there is no setting {prefix}{name}{did_you_mean(str(name), known)}")
        inner = hints[name]
        given[name] = (
            _made(inner, value, f"{prefix}{name}.")
            if dataclasses.is_dataclass(inner)
            else _converted(inner, value, f"{prefix}{name}")
        )
    return kind(**given)


def _converted(kind: Any, value: Any, name: str) -> Any:
    """The value if it has the type of the field; numbers written as text are read, as YAML takes 1e-3 for text."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
        return _converted(kind, value, name)
    if origin is Literal:
        if value not in options:
            known = ", ".join(map(str, options))
            raise ValueError(f"{name} is {value!r}, expected one of {known}{did_you_mean(str(value), options)}")
        return value
    if origin is list:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return [_converted(options[0], each, name) for each in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must hold settings by name, got {value!r}")
        return dict(value)
    if kind is float and (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return float(value)
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, os.PathLike) and kind is str:
        return os.fspath(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
        raise ValueError(f"{name} must be {words.get(kind, kind)}, got {value!r}")
    return value


@functools.cache  # the annotations are text, which is compiled every time
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _check(values: Any, prefix: str) -> None:
    """Types and ranges of one dataclass, however it was made."""
    kind: Any = type(values)
    hints = _types(kind)
    for each in fields(values):
        value = getattr(values, each.name)
        if dataclasses.is_dataclass(hints[each.name]):
            if not isinstance(value, hints[each.name]):
                raise ValueError(f"{prefix}{each.name} must be a {hints[each.name].__name__}, got {value!r}")
            continue
        _converted(hints[each.name], value, f"{prefix}{each.name}")
        if isinstance(value, float) and math.isinf(value):
            raise ValueError(f"{prefix}{each.name} must be finite, got {value!r}")
        if value is not None and (low := each.metadata.get("low")) is not None and not value >= low:
            raise ValueError(f"{prefix}{each.name} must be at least {low}, got {value!r}")
        if value is not None and (above := each.metadata.get("above")) is not None and not value > above:
            raise ValueError(f"{prefix}{each.name} must be above {above}, got {value!r}")
        if value is not None and (below := each.metadata.get("below")) is not None and not value < below:
            raise ValueError(f"{prefix}{each.name} must be below {below}, got {value!r}")
