"""The recipe: learning rate by step, mixing of images, the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.methods import Method
from gradsel.training.config import RecipeConfig
from gradsel.training.models import logits_of


class Recipe:
    """A :class:`RecipeConfig` with the defaults of a method filled in.

    Attributes:
        rate: the peak of the learning rate.
        warmup_epochs: epochs with a rising rate.
        epochs: all epochs, warm-up before and cool-down after them included.
    """

    def __init__(self, config: RecipeConfig, method: Method, classes: int) -> None:
        self.config = config
        self.rate = method.rate if config.learning_rate is None else config.learning_rate
        warmup = config.epochs / 10 if config.warmup_epochs is None else config.warmup_epochs
        before = (config.warmup or method.warmup) == "before"
        if before:
            warmup = float(math.ceil(warmup))  # training has whole epochs
        elif warmup >= config.epochs:
            raise ValueError(
                f"recipe.warmup_epochs is {warmup:g}, which leaves nothing of the {config.epochs} epochs; pass fewer, "
                "or --warmup before, which adds them"
            )
        self.warmup_epochs = warmup
        self.epochs = config.epochs + (int(warmup) if before else 0) + config.cooldown_epochs
        self._mix = _mixing(config, classes)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, 0 to ``steps - 1``: linear to the peak, half a cosine, then flat."""
        first, last = self.config.first_learning_rate, self.config.last_learning_rate
        rising = round(steps * self.warmup_epochs / self.epochs)
        if step < rising:
            return first + (self.rate - first) * step / rising
        last_step = round(steps * (1 - self.config.cooldown_epochs / self.epochs))
        falling = min((step - rising) / max(last_step - rising, 1), 1.0)
        return last + (self.rate - last) * (1 + math.cos(math.pi * falling)) / 2

    def factor(self, steps: int) -> Callable[[int], float]:
        """For ``torch.optim.lr_scheduler.LambdaLR``: the rate of a step, in parts of the peak."""
        return lambda step: self.rate_at(step, steps) / self.rate

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self._mix is not None

    def mix(self, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Mixes images and their labels, which become probabilities [batch, classes]."""
        if self._mix is None or "pixel_values" not in inputs:
            return inputs, labels
        images, labels = self._mix(inputs["pixel_values"], labels)
        return {**inputs, "pixel_values": images}, labels

    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The logits [batch, classes] of a batch."""
        return logits_of(model, inputs)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in float32, with label smoothing."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)


def _mixing(config: RecipeConfig, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """mixup, cutmix, or for each batch one of them at random."""
    if not (config.mixup or config.cutmix):
        return None
    from torchvision.transforms import v2

    chosen = [
        kind(alpha=alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        if alpha
    ]
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)
    return mix


def precision_dtype(precision: str) -> torch.dtype | None:
    """The dtype of autocast, or None."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
