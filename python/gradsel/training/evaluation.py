"""Predictions of a model on a data set, and their metrics by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gradsel.training.datasets import batches_of
from gradsel.training.glue import TASKS, scores
from gradsel.training.models import logits_of
from gradsel.training.processes import ALONE, Processes


@torch.no_grad()
def predictions(
    model: nn.Module, dataset: Dataset, collate: Callable[..., dict[str, Tensor]], *, batch_size: int = 32,
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, workers: int = 0,
    outputs: Callable[[nn.Module, dict[str, Tensor]], Tensor] = logits_of, processes: Processes = ALONE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits [samples, classes] in float32 and labels [samples], on the CPU, in the order of the data set.

    Args:
        outputs: what of a batch is predicted, if not logits of classes.
        dtype: of autocast; None: none.
        processes: among which the batches are shared out. Every rank gets all logits, each sample once, with the bits
            that a single process computes.
    """
    device = torch.device(device)
    was_training = model.training
    model.eval()
    found: list[tuple[Tensor, Tensor]] = []
    own = processes.share(batches_of(range(len(dataset)), batch_size))  # type: ignore[arg-type]
    for batch in DataLoader(dataset, batch_sampler=own, collate_fn=collate, num_workers=workers):
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = outputs(model, inputs)
        found.append((logits.float().cpu(), batch["labels"]))
    model.train(was_training)
    found = processes.joined(found)
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def metrics(logits: Tensor, labels: Tensor, classes: Sequence[str], task: str = "") -> dict[str, Any]:
    """Accuracy and more, by scikit-learn.

    Args:
        logits: [samples, classes].
        labels: [samples].
        task: of GLUE, whose own metrics are then there as well, as ``glue``.

    Returns:
        ``samples``; ``loss``, the cross-entropy; ``top1`` and, with more than five classes, ``top5``, in percent;
        ``f1``, the macro average, in percent; ``matthews``, Matthews' correlation; ``per_class``: precision, recall, F1
        and number of samples of each class; ``confusion``: samples of each class (row) by predicted class (column).
    """
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        f1_score,
        matthews_corrcoef,
        precision_recall_fscore_support,
        top_k_accuracy_score,
    )

    truth, guess = labels.numpy(), logits.argmax(1).numpy()
    numbers = numpy.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(truth, guess, labels=numbers, zero_division=0)
    found: dict[str, Any] = {
        "samples": len(truth),
        "loss": float(nn.functional.cross_entropy(logits.double(), labels)),
        "top1": 100 * float(accuracy_score(truth, guess)),
        "f1": 100 * float(f1_score(truth, guess, labels=numbers, average="macro", zero_division=0)),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)  # the correlation is then 0
        found["matthews"] = float(matthews_corrcoef(truth, guess))
    if len(classes) > 5:
        found["top5"] = 100 * float(top_k_accuracy_score(truth, logits.numpy(), k=5, labels=numbers))
    if task in TASKS:
        found["glue"] = scores(task, logits, labels)
    found["per_class"] = {
        name: {
            "precision": float(precision[number]),
            "recall": float(recall[number]),
            "f1": float(f1[number]),
            "samples": int(support[number]),
        }
        for number, name in enumerate(classes)
    }
    found["confusion"] = confusion_matrix(truth, guess, labels=numbers).tolist()
    return found
