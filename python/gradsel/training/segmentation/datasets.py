"""Images with masks for the loop: both resized to the input size of the model, and augmented together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradsel.training.augmentation import seeded
from gradsel.training.data import Split
from gradsel.training.datasets import open_image
from gradsel.training.models import ImageInput
from gradsel.training.segmentation.data import read_mask

Sample = dict[str, Any]


class MaskedImages(Dataset[Sample]):
    """Images with masks as they are needed, with augmentation that depends on seed, epoch and sample alone.

    A sample has ``pixel_values`` [3, height, width] and ``labels`` [height, width], uint8, 1 for foreground.

    Attributes:
        epoch: number of the pass over the data.
    """

    def __init__(self, split: Split, transform: Callable[..., Any], seed: int = 0) -> None:
        self.split, self.transform, self.seed = split, transform, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> Sample:
        from torchvision import tv_tensors

        image = open_image(self.split.inputs[index])
        mask = tv_tensors.Mask(read_mask(self.split.labels[index]).unsqueeze(0))
        with seeded(self.seed, self.epoch, index):
            pixels, target = self.transform(image, mask)
        return {"pixel_values": pixels, "labels": target.squeeze(0)}


def transforms(image: ImageInput, augmentation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What is done to images, and with them to masks, in training and in testing.

    Masks take the nearest pixel when they are resized. Testing always resizes the whole image, without its aspect, as
    SAM-Adapter and GPS do.
    """
    from torchvision.transforms import v2

    size, how = list(image.size), v2.InterpolationMode(image.interpolation)
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(image.mean), list(image.std))]
    direct = v2.Resize(size, interpolation=how)
    training: list[Any] = {
        "crop": [v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=how), v2.RandomHorizontalFlip()],
        "flip": [direct, v2.RandomHorizontalFlip()],
        "none": [direct],
    }[augmentation]
    return v2.Compose([*training, *end]), v2.Compose([direct, *end])


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A batch: ``pixel_values`` [batch, 3, height, width], ``labels`` [batch, height, width]."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "labels")}
