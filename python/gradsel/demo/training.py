"""The training loop that a user would write: cross-entropy, warm-up and cosine, seeded augmentation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm.auto import tqdm

#: An augmented copy of a batch of images, drawn from the generator.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class History(NamedTuple):
    """The loss and the wall-clock seconds of every step of :func:`fine_tune`."""

    losses: list[float]
    seconds: list[float]


def warmup_cosine(
    step: int, steps: int, peak: float, warmup: float = 0.1, start: float = 1e-7, end: float = 1e-8
) -> float:
    """The learning rate of one step: linear from ``start`` to ``peak``, then half a cosine to ``end``.

    Args:
        step: 0 to ``steps - 1``.
        steps: length of the schedule.
        peak: the largest rate, reached at the end of the warm-up.
        warmup: fraction of the steps that are warm-up.
        start, end: rates at the first step and at the end (1e-7 and 1e-8 in GPS).
    """
    rising = round(warmup * steps)
    if step < rising:
        return start + (peak - start) * step / rising
    falling = (step - rising) / max(steps - rising, 1)
    return end + (peak - end) * (1 + math.cos(math.pi * falling)) / 2


def jitter(
    images: Tensor, generator: torch.Generator, shift: float = 1.0, degrees: float = 10.0, scale: float = 0.1
) -> Tensor:
    """Randomly shifts, rotates and scales each image on its own, repeating the edge pixels outside.

    Args:
        images: [batch, channels, side, side].
        shift: largest shift in pixels, in each direction.
        degrees: largest angle.
        scale: largest relative change of size.
    """
    count, side = len(images), images.shape[-1]
    draws = torch.rand(count, 4, generator=generator) * 2 - 1
    angle = draws[:, 0] * math.radians(degrees)
    zoom = 1 + draws[:, 1] * scale
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    shifts = draws[:, 2:] * shift * 2 / side  # affine_grid's image is 2 wide
    matrix = torch.stack([cos, -sin, shifts[:, 0], sin, cos, shifts[:, 1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the data in random order."""
    for index in torch.randperm(len(labels), generator=generator).split(size):
        yield images[index], labels[index]


def fine_tune(
    model: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 32,
    augment: Augmentation = jitter,
    seed: int = 0,
    progress: str | None = None,
) -> History:
    """Trains the parameters of ``optimizer`` on cross-entropy; the learning rate follows :func:`warmup_cosine`.

    Args:
        lr: the peak rate.
        seed: seed of the order of the images and of the augmentation.
        progress: the title of a progress bar, shown on a terminal; None: no bar.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(labels) / batch_size)
    history = History([], [])
    model.train()
    with tqdm(total=steps, desc=progress, unit="step", leave=False, disable=True if progress is None else None) as bar:
        for _ in range(epochs):
            for batch, target in batches(images, labels, batch_size, generator):
                batch = augment(batch, generator)
                start = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = warmup_cosine(len(history.losses), steps, lr)
                loss = F.cross_entropy(model(batch), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.losses.append(loss.item())
                history.seconds.append(time.perf_counter() - start)
                bar.update()
    return history


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 512) -> float:
    """The percentage of images that are classified correctly."""
    model.eval()
    right = sum(
        int((model(batch).argmax(1) == target).sum())
        for batch, target in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    return 100 * right / len(labels)
