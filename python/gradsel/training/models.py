"""Models by name, with a new head of the right size: timm, transformers, local folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradsel.errors import did_you_mean, first_line
from gradsel.methods import Parts
from gradsel.parameters.rules import HEAD, RuleOptions
from gradsel.training.config import ModelConfig

#: Layers in front of the head that are new together with it.
_NEW = ("pre_classifier",)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageInput(NamedTuple):
    """What a model expects of images.

    Attributes:
        size: height and width.
        crop: the part of a resized image that is kept in testing.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 0.9


@dataclass
class Loaded:
    """A model with a new head, and what prepares its inputs.

    Attributes:
        family: ``"timm"`` or ``"transformers"``.
        head: names of the modules that are new, for :func:`gradsel.parameters.rules.parameter_rules`.
        parts: what becomes of parameters that the general rules would treat otherwise.
        image: for images.
        tokenizer: for texts.
        positions: the most tokens of a text.
    """

    model: nn.Module
    family: str
    head: tuple[str, ...] = HEAD
    image: ImageInput | None = None
    tokenizer: Any = None
    positions: int = 10**9
    parts: Parts = field(default_factory=Parts)

    @property
    def rules(self) -> RuleOptions:
        """The arguments of :func:`gradsel.parameters.rules.parameter_rules`."""
        return self.parts.rules(self.head)


def load_model(
    config: ModelConfig, classes: Sequence[str], kind: str, seed: int = 0, image_size: int | None = None
) -> Loaded:
    """Makes the model with a new head, whose initial values depend on ``seed`` alone.

    Args:
        classes: their names, in the order of the outputs.
        kind: ``"images"`` or ``"texts"``.
        image_size: height and width of the input; None: the model's own.

    Raises:
        ValueError: there is no such model, it is for another kind of data, or its weights cannot be had; the message is
            one line.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        name = timm_name(config.name)
        if name is not None:
            if kind != "images":
                raise ValueError(f"model.name: {config.name} is a model for images, the data are {kind}")
            return _timm(name, config, len(classes), image_size)
        with quiet_transformers():
            return _transformers(config, classes, kind, image_size)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the table of new weights and the progress bars of transformers: a new head is what is wanted."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def timm_name(name: str) -> str | None:
    """What timm calls the model, or None if it belongs to transformers.

    Raises:
        ValueError: the name is that of neither.
    """
    import timm

    folder = Path(name)
    if folder.is_dir():
        described = _described(folder)
        return f"local-dir:{name}" if "architecture" in described else None
    bare = name.removeprefix("timm/")
    if timm.is_model(bare):
        return bare
    if name != bare:
        raise ValueError(f"model.name: timm has no model {bare!r}{did_you_mean(bare, timm.list_models())}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model.name: there is no folder {name}")
    return None


def _described(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, Mapping) or not ({"architecture", "model_type"} & set(found)):
        raise ValueError(f"model.name: {folder} has no config.json that describes a model of transformers or timm")
    return found


def _timm(name: str, config: ModelConfig, classes: int, image_size: int | None) -> Loaded:
    import timm
    from timm.data import resolve_model_data_config

    options = dict(config.options)
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    same = (image_size, [image_size, image_size], (image_size, image_size))
    if image_size is not None and options.get("img_size", image_size) not in same:
        raise ValueError(
            f"data.image_size is {image_size}, but model.options has img_size={options['img_size']}; pass one of them"
        )
    model = _try(
        lambda sized: timm.create_model(
            name, pretrained=config.weights == "pretrained", num_classes=classes, **options, **sized
        ),
        config,
        {"img_size": image_size} if image_size is not None and "img_size" not in options else {},
    )
    given = resolve_model_data_config(model)
    size = options.get("img_size", image_size) or given["input_size"][1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    head = (model.pretrained_cfg or {}).get("classifier") or HEAD
    head = (head,) if isinstance(head, str) else tuple(head)
    image = ImageInput(size, tuple(given["mean"]), tuple(given["std"]), given["interpolation"], given["crop_pct"])
    return Loaded(model, "timm", head, image)


def _try(make: Any, config: ModelConfig, sized: dict[str, Any]) -> Any:
    """Makes a model of timm; one that takes no size of the image, a convolutional network, works on any."""
    try:
        try:
            return make(sized)
        except TypeError as error:
            if not sized or "img_size" not in str(error):
                raise
            return make({})
    except TypeError as error:
        raise ValueError(f"model.options: {config.name} refuses them: {error}") from None
    except Exception as error:
        raise unavailable(config, error) from error


def unavailable(config: ModelConfig, error: Exception) -> ValueError:
    """The error of a model whose weights cannot be had, in one line."""
    fetched = config.weights == "pretrained" and not Path(config.name).is_dir()
    hint = "; pass --weights none for random weights" if fetched else ""
    return ValueError(f"model.name: {config.name} cannot be loaded ({type(error).__name__}: {first_line(error)}){hint}")


def settings_of(config: ModelConfig, **more: Any) -> Any:
    """The configuration of a model of transformers.

    Args:
        more: further fields of it.

    Raises:
        ValueError: there is no such model, or it lacks what the settings ask for.
    """
    import transformers

    options = {**config.options, **more}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    try:
        settings = transformers.AutoConfig.from_pretrained(config.name, **options)
    except Exception as error:
        import timm

        hint = did_you_mean(config.name, timm.list_models()) if "/" not in config.name else ""
        raise ValueError(
            f"model.name: {config.name!r} is neither a model of timm nor a local folder, and cannot be fetched as a "
            f"model of transformers ({type(error).__name__}: {first_line(error)}){hint}"
        ) from error
    if config.drop_path and not hasattr(type(settings)(), "drop_path_rate"):
        raise ValueError(f"model.drop_path: {config.name} ({settings.model_type}) has no drop path")
    return settings


def _transformers(config: ModelConfig, classes: Sequence[str], kind: str, image_size: int | None) -> Loaded:
    import transformers

    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    settings = settings_of(config, **names)
    if image_size is not None and hasattr(settings, "image_size"):
        settings.image_size = image_size
    auto = (
        transformers.AutoModelForImageClassification
        if kind == "images"
        else transformers.AutoModelForSequenceClassification
    )
    if type(settings) not in auto._model_mapping:
        hint = "; for images with masks, pass --task segmentation" if settings.model_type == "sam" else ""
        raise ValueError(f"model.name: {config.name} ({settings.model_type}) is not a model for {kind}{hint}")
    tokenizer = _tokenizer(config.name, settings) if kind == "texts" else None
    try:
        if config.weights == "none":
            model, new = auto.from_config(settings), set()
        else:
            model, info = auto.from_pretrained(
                config.name, config=settings, ignore_mismatched_sizes=True, output_loading_info=True
            )
            mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
            new = {*info["missing_keys"], *mismatched}
    except Exception as error:
        raise unavailable(config, error) from error
    model.float()
    weights = dict(model.named_parameters())
    modules = {name.rpartition(".")[0] for name in new if name in weights} - {""}
    head = (*HEAD, *_NEW, *sorted(modules))
    image = image_input(config.name, settings, image_size) if kind == "images" else None
    return Loaded(model, "transformers", head, image, tokenizer, _positions(settings, tokenizer))


def _positions(settings: Any, tokenizer: Any) -> int:
    """The most tokens that both the tokenizer and the model take; RoBERTa's positions begin behind the padding's."""
    if tokenizer is None:
        return 10**9
    own = getattr(settings, "max_position_embeddings", None) or 10**9
    if "roberta" in settings.model_type or settings.model_type in ("camembert", "mpnet", "longformer"):
        own -= (settings.pad_token_id or 0) + 1
    return min(own, int(min(tokenizer.model_max_length, 10**9)))


def _tokenizer(name: str, settings: Any) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(f"model.name: {name} has no tokenizer that can be loaded ({type(error).__name__})") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(  # transformers makes such a one for a folder without the files of a tokenizer
            f"model.name: the tokenizer of {name} knows no words, so every text would be the same to the model; put "
            "the files of its tokenizer (tokenizer.json, or a vocabulary) beside the weights"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model.name: the tokenizer of {name} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def image_input(name: str, settings: Any, image_size: int | None) -> ImageInput:
    """What a model of transformers expects of images.

    Args:
        image_size: height and width; None: what the configuration says.
    """
    import transformers

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        own = processor.size.get("height") or processor.size.get("shortest_edge")
    except Exception:  # a folder without preprocessor_config.json
        mean, std, own = IMAGENET_MEAN, IMAGENET_STD, None
    size = image_size or getattr(settings, "image_size", None) or own or 224
    size = (size, size) if isinstance(size, int) else tuple(size)
    return ImageInput(size, mean, std)


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The outputs [batch, classes] of a model of any family.

    Args:
        inputs: of a batch, without labels. A model without a configuration of transformers gets the only one.
    """
    if takes_mapping(model):
        return model(**inputs).logits
    found: Tensor = model(*inputs.values())
    return found


def takes_mapping(model: nn.Module) -> bool:
    """Whether the model is one of transformers, in any wrapper."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):  # of PEFT
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            return hasattr(inner, "config") and hasattr(inner, "base_model")
