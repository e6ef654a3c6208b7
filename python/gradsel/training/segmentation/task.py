"""Segmentation as a task: SAM without prompts on images with masks, as in GPS, section 4.3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradsel.methods import METHODS, Method, method
from gradsel.selection.selection import Selection
from gradsel.training.config import Config
from gradsel.training.data import Data, Split
from gradsel.training.models import Loaded
from gradsel.training.recipe import Recipe
from gradsel.training.segmentation.data import read_masks
from gradsel.training.segmentation.datasets import MaskedImages, collate, transforms
from gradsel.training.segmentation.model import batch_loss, load_sam, mask_loss, masks_of
from gradsel.training.segmentation.scores import dice_and_iou, mean, metrics
from gradsel.training.task import Batch, Sample, Task

_METHODS = ("gps", "grft", "full", "linear", "bias", "lora")
_AUGMENTATIONS = ("crop", "flip", "none")
#: Settings of classification alone.
_NOT_FOR_MASKS = {
    "data": (
        "kind", "layout", "root", "download", "validation", "classes", "image_column", "text_columns", "label_column",
        "selection_augmentation",
    ),
    "recipe": ("mixup", "cutmix", "label_smoothing"),
}  # fmt: skip


class MaskRecipe(Recipe):
    """The schedule of a recipe with the loss of masks."""

    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The logits of the masks [batch, height, width]."""
        return masks_of(model, inputs)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See :func:`gradsel.training.segmentation.model.mask_loss`."""
        return mask_loss(logits, labels)


class Segmentation(Task):
    """Foreground and background, by binary cross-entropy and IoU; weights are ranked by the same loss."""

    name: ClassVar[str] = "segmentation"
    selection_loss = staticmethod(batch_loss)

    def method(self, config: Config) -> Method:
        name, options = config.method.name, dict(config.method.options)
        if name in METHODS and name not in _METHODS:
            raise ValueError(f"method.name: {name} is not for segmentation; {', '.join(_METHODS)} are")
        if name in METHODS and METHODS[name].needs_batches and options.setdefault("loss", "task") != "task":
            raise ValueError(
                f"method.options.loss is {options['loss']!r}, but without classes, weights are ranked by the loss of "
                "the masks; leave --selection-loss out"
            )
        if options.get("anchor_blocks", "all") != "all":
            raise ValueError(
                "method.options.anchor_blocks counts the last blocks of a classifier; segmentation takes all, got "
                f"{options['anchor_blocks']!r}"
            )
        for part, settings in _NOT_FOR_MASKS.items():
            for setting in settings:
                value = getattr(getattr(config, part), setting)
                if value != getattr(getattr(Config(), part), setting):
                    raise ValueError(f"{part}.{setting} is {value!r}, but it is for classification alone; leave it out")
        if config.data.augmentation not in _AUGMENTATIONS:
            raise ValueError(
                f"data.augmentation is {config.data.augmentation!r}, expected one of {', '.join(_AUGMENTATIONS)} for "
                "segmentation"
            )
        return method(name, **options)

    def recipe(self, config: Config, how: Method, classes: int) -> Recipe:
        return MaskRecipe(config.recipe, how, classes)

    def read(self, config: Config, *, only_test: bool = False) -> Data:
        return read_masks(config.data, config.seed, only_test=only_test)

    def load(self, config: Config, classes: Sequence[str], kind: str) -> Loaded:
        return load_sam(config.model, config.seed, config.data.image_size)

    def datasets(
        self, splits: Mapping[str, Split], loaded: Loaded, config: Config
    ) -> tuple[dict[str, Dataset[Sample]], Dataset[Sample], bool]:
        assert loaded.image is not None
        training, testing = transforms(loaded.image, config.data.augmentation)
        found: dict[str, Dataset[Sample]] = {
            name: MaskedImages(split, training if name == "train" else testing, config.seed)
            for name, split in splits.items()
        }
        return found, MaskedImages(splits["train"], testing, config.seed), False

    def testing(self, split: Split, loaded: Loaded, config: Config) -> Dataset[Sample]:
        assert loaded.image is not None
        return MaskedImages(split, transforms(loaded.image, config.data.augmentation)[1], config.seed)

    def collate(self, loaded: Loaded) -> Callable[[Sequence[Sample]], Batch]:
        return collate

    def outputs(self, model: nn.Module, inputs: Batch) -> Tensor:
        return masks_of(model, inputs)

    def metric(self, config: Config) -> str:
        return "mdice"

    def score(self, prediction: Any, config: Config) -> dict[str, float]:
        dice, iou = dice_and_iou(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))
        return {"mdice": 100 * mean(dice), "miou": 100 * mean(iou)}

    def metrics(self, outputs: Tensor, labels: Tensor, classes: Sequence[str], config: Config) -> dict[str, Any]:
        return metrics(outputs, labels)

    def rows(self, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [("mDice", f"{metrics['mdice']:.2f} %"), ("mIoU", f"{metrics['miou']:.2f} %")]

    def described(self, metrics: Mapping[str, Any]) -> str:
        scores = ", ".join(f"{name} {value}" for name, value in self.rows(metrics))
        return f"{scores}, loss {metrics['loss']:.4f}, {metrics['samples']:,} images"

    def pipeline(self, kind: str) -> str:
        return "image-segmentation"

    def hub_metrics(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        return {"dice": metrics["mdice"] / 100, "mean_iou": metrics["miou"] / 100}

    def summary(self, results: Mapping[str, Any]) -> str:
        found = results["metrics"]
        return f"Foreground and background: mDice {found['mdice']:.2f} % on {found['samples']:,} test images."

    def example(self, folder: str, given: str) -> str:
        return (
            f"from gradsel.training import predict_masks\n\n[mask] = predict_masks({folder!r}, [{given}])\n"
            'print(f"{mask.float().mean():.1%} of the image")'
        )

    def report(
        self, folder: Path, config: Config, results: dict[str, Any], data: Data, outputs: Tensor, labels: Tensor,
        selection: Selection | None,
    ) -> None:  # fmt: skip
        from gradsel.training.segmentation.report import write_report

        write_report(folder, config, results, data, outputs, selection)
