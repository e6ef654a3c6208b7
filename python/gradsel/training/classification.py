"""Classification of images and texts as a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradsel.methods import Method, method
from gradsel.selection.selection import Selection
from gradsel.tables import table
from gradsel.training.config import Config
from gradsel.training.data import Data, Split, read_data
from gradsel.training.datasets import Images, Texts, collate, datasets_of, transforms
from gradsel.training.evaluation import metrics
from gradsel.training.glue import TASKS, metric_of, scores
from gradsel.training.models import Loaded, load_model, logits_of
from gradsel.training.recipe import Recipe
from gradsel.training.task import Batch, Sample, Task


class Classification(Task):
    """One class for each image or text, by cross-entropy."""

    name: ClassVar[str] = "classification"

    def method(self, config: Config) -> Method:
        if config.method.options.get("loss") == "task":
            raise ValueError(
                "method.options.loss: classification ranks by the loss contrastive or cross-entropy, got task"
            )
        return method(config.method.name, **config.method.options)

    def recipe(self, config: Config, how: Method, classes: int) -> Recipe:
        return Recipe(config.recipe, how, classes)

    def read(self, config: Config, *, only_test: bool = False) -> Data:
        return read_data(config.data, config.seed, only_test=only_test)

    def load(self, config: Config, classes: Sequence[str], kind: str) -> Loaded:
        return load_model(config.model, classes, kind, config.seed, config.data.image_size)

    def datasets(
        self, splits: Mapping[str, Split], loaded: Loaded, config: Config
    ) -> tuple[dict[str, Dataset[Sample]], Dataset[Sample], bool]:
        return datasets_of(splits, loaded, config.data, config.seed)

    def testing(self, split: Split, loaded: Loaded, config: Config) -> Dataset[Sample]:
        if loaded.tokenizer is not None:
            return Texts(split, loaded.tokenizer, min(config.data.max_length, loaded.positions))
        assert loaded.image is not None
        return Images(split, transforms(loaded.image, config.data.augmentation)[1], config.seed)

    def collate(self, loaded: Loaded) -> Callable[[Sequence[Sample]], Batch]:
        return collate(loaded)

    def outputs(self, model: nn.Module, inputs: Batch) -> Tensor:
        return logits_of(model, inputs)

    def metric(self, config: Config) -> str:
        return metric_of(config.data.task)

    def score(self, prediction: Any, config: Config) -> dict[str, float]:
        found = {"top1": 100 * float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}
        if config.data.task in TASKS:
            logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
            found |= scores(config.data.task, logits, labels)
        return found

    def metrics(self, outputs: Tensor, labels: Tensor, classes: Sequence[str], config: Config) -> dict[str, Any]:
        return metrics(outputs, labels, classes, config.data.task)

    def rows(self, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
        if "glue" in metrics:
            own = {"matthews": "Matthews correlation", "f1": "F1", "accuracy": "accuracy"}
            return [(own[name], f"{value:.2f} %") for name, value in metrics["glue"].items()]
        names = {"top1": "top-1", "top5": "top-5", "f1": "macro F1"}
        return [
            *((name, f"{metrics[key]:.2f} %") for key, name in names.items() if key in metrics),
            ("Matthews correlation", f"{metrics['matthews']:.3f}"),
        ]

    def described(self, metrics: Mapping[str, Any]) -> str:
        lines = [
            (name, *(f"{100 * values[key]:9.1f}" for key in ("precision", "recall", "f1")), f"{values['samples']:7,}")
            for name, values in metrics["per_class"].items()
        ]
        own = (
            [", ".join(f"{name} {value:.2f} %" for name, value in metrics["glue"].items())] if "glue" in metrics else []
        )
        five = f", top-5 {metrics['top5']:.2f} %" if "top5" in metrics else ""
        return "\n".join(
            (
                *table(("class", "precision", "recall", "f1", "samples"), lines),
                *own,
                f"top-1 {metrics['top1']:.2f} %{five}, F1 {metrics['f1']:.2f} %, Matthews {metrics['matthews']:.3f}, "
                f"loss {metrics['loss']:.4f}, {metrics['samples']:,} samples",
            )
        )

    def pipeline(self, kind: str) -> str:
        return "image-classification" if kind == "images" else "text-classification"

    def hub_metrics(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        return {
            "accuracy": metrics["top1"] / 100,
            "f1": metrics["f1"] / 100,
            "matthews_correlation": metrics["matthews"],
        }

    def summary(self, results: Mapping[str, Any]) -> str:
        right = f"{results['metrics']['top1']:.2f} % of {results['metrics']['samples']:,} test samples right"
        return f"{results['classes']} classes of {results['kind']}, {right}."

    def example(self, folder: str, given: str) -> str:
        return (
            f"[classes] = gradsel.predict({folder!r}, [{given}])\n"
            "for name, probability in classes:\n"
            '    print(f"{name}: {probability:.1%}")'
        )

    def report(
        self, folder: Path, config: Config, results: dict[str, Any], data: Data, outputs: Tensor, labels: Tensor,
        selection: Selection | None,
    ) -> None:  # fmt: skip
        from gradsel.training.report import write_report

        write_report(folder, config, results, data, outputs, labels, selection)
