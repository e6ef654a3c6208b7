"""How well predicted masks fit: Dice and IoU by torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsel.training.segmentation.model import mask_loss, resized


def dice_and_iou(logits: Tensor, masks: Tensor) -> tuple[list[float], list[float]]:
    """Dice and IoU of the foreground in each image, at the size of the masks; NaN where there is none in either.

    Args:
        logits: [samples, height, width] of any size. Foreground is what has a probability above one half.
        masks: [samples, height, width] of 0 and 1.
    """
    from torchmetrics.functional.segmentation import dice_score, mean_iou

    dice, iou = [], []
    for logit, mask in zip(logits.split(1), masks.split(1), strict=True):
        guess = (resized(logit, (mask.shape[-2], mask.shape[-1])) > 0).to(torch.uint8).unsqueeze(1)
        truth = mask.to(torch.uint8).unsqueeze(1)
        dice.append(float(dice_score(guess, truth, num_classes=1, average="none")))
        overlap = float(mean_iou(guess, truth, num_classes=1, per_class=True))
        iou.append(math.nan if overlap < 0 else overlap)  # torchmetrics says -1 where there is none in either
    return dice, iou


def metrics(logits: Tensor, masks: Tensor) -> dict[str, Any]:
    """Metrics of a data set; see :func:`dice_and_iou`.

    Returns:
        ``samples``; ``loss``; ``mdice`` and ``miou``, means over images in percent; ``per_image``: ``dice`` and ``iou``
        of each, in order. Images without foreground, in which none was predicted, count in no mean and are None.
    """
    dice, iou = dice_and_iou(logits, masks)
    losses = [float(mask_loss(*each)) for each in zip(logits.split(1), masks.split(1), strict=True)]
    return {
        "samples": len(masks),
        "loss": math.fsum(losses) / len(losses),
        "mdice": 100 * mean(dice),
        "miou": 100 * mean(iou),
        "per_image": {"dice": [_json(value) for value in dice], "iou": [_json(value) for value in iou]},
    }


def mean(values: Sequence[float]) -> float:
    """The mean of what is not NaN."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / max(len(known), 1)


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value
