"""Data sets for the loop: images, augmented as seed, epoch and sample say, and tokenised texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gradsel.training.config import DataConfig
from gradsel.training.data import Split
from gradsel.training.models import ImageInput, Loaded

Sample = dict[str, Any]
_PRIMES = (1_000_003, 7_919)


class Images(Dataset[Sample]):
    """Images as they are needed, each with augmentation that depends on seed, epoch and sample alone.

    So a resumed run sees the same images, whatever was loaded ahead and by how many processes.

    Attributes:
        epoch: number of the pass over the data.
    """

    def __init__(
        self, split: Split, transform: Callable[[Any], Tensor], seed: int = 0, views: int | None = None
    ) -> None:
        """
        Args:
            views: augmented views of each image, [views, 3, height, width]; None: one, without that dimension.
        """
        self.split, self.transform, self.seed, self.views = split, transform, seed, views
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> Sample:
        image = open_image(self.split.inputs[index])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((self.seed * _PRIMES[0] + self.epoch) * _PRIMES[1] + index) % 2**63)
            if self.views is None:
                pixels = self.transform(image)
            else:
                pixels = torch.stack([self.transform(image) for _ in range(self.views)])
        return {"pixel_values": pixels, "labels": self.split.labels[index]}


def open_image(path: str) -> Any:
    """An image in RGB.

    Raises:
        ValueError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises whatever its decoders do
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__})") from None


def transforms(image: ImageInput, augmentation: str) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """What is done to images in training, and in testing."""
    from torchvision.transforms import v2

    how = v2.InterpolationMode(image.interpolation if image.interpolation in ("bilinear", "bicubic") else "bicubic")
    end = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(image.mean), list(image.std)),
    ]
    size = list(image.size)
    direct = v2.Resize(size, interpolation=how)
    larger = [round(side / image.crop) for side in size]
    training: list[Any] = {
        "crop": [v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=how), v2.RandomHorizontalFlip()],
        "flip": [direct, v2.RandomHorizontalFlip()],
        "none": [direct],
    }[augmentation]
    testing = [v2.Resize(larger, interpolation=how), v2.CenterCrop(size)] if augmentation == "crop" else [direct]
    return v2.Compose([*training, *end]), v2.Compose([*testing, *end])


class Texts(Dataset[Sample]):
    """Tokenised texts."""

    def __init__(self, split: Split, tokenizer: Any, max_length: int) -> None:
        columns = [list(column) for column in zip(*split.inputs, strict=True)]
        self._encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> Sample:
        sample = {name: values[index] for name, values in self._encoded.items()}
        return {**sample, "labels": self.split.labels[index]}


def collate(loaded: Loaded) -> Callable[[Sequence[Sample]], dict[str, Tensor]]:
    """Makes a batch: images are stacked, texts padded to the longest."""
    if loaded.tokenizer is None:
        return _stack
    from transformers import DataCollatorWithPadding

    padded: Callable[[Sequence[Sample]], dict[str, Tensor]] = DataCollatorWithPadding(loaded.tokenizer)
    return lambda samples: dict(padded(samples))


def _stack(samples: Sequence[Sample]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def datasets_of(
    splits: Mapping[str, Split], loaded: Loaded, config: DataConfig, seed: int
) -> tuple[dict[str, Dataset[Sample]], Dataset[Sample], bool]:
    """The data sets by split, the one to select on, and whether its samples have two views."""
    if loaded.tokenizer is not None:
        texts: dict[str, Dataset[Sample]] = {
            name: Texts(split, loaded.tokenizer, min(config.max_length, loaded.positions))
            for name, split in splits.items()
        }
        return texts, texts["train"], False
    assert loaded.image is not None
    training, testing = transforms(loaded.image, config.augmentation)
    images: dict[str, Dataset[Sample]] = {
        name: Images(split, training if name == "train" else testing, seed) for name, split in splits.items()
    }
    views = config.augmentation != "none"
    return images, Images(splits["train"], training, seed, 2 if views else None), views


class SelectionBatches:
    """Batches to select on: shuffled by the seed, the same in every pass, on the device.

    Without views, a batch in which every class occurs once has no pair to compare; it is left out and counted.

    Attributes:
        left_out: batches without a pair, in the last pass.
    """

    def __init__(
        self, dataset: Dataset[Sample], size: int, collate: Callable[..., dict[str, Tensor]],
        device: torch.device, seed: int, workers: int = 0, pairs: bool = True,
    ) -> None:  # fmt: skip
        """
        Args:
            pairs: whether the loss needs two samples of a class in every batch.
        """
        self._dataset, self._size, self._collate, self._device = dataset, size, collate, device
        self._seed, self._workers, self._pairs = seed, workers, pairs
        self.left_out = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        length = len(self._dataset)  # type: ignore[arg-type]
        order = torch.randperm(length, generator=torch.Generator().manual_seed(self._seed)).tolist()
        loader = DataLoader(
            Subset(self._dataset, order), self._size, collate_fn=self._collate, num_workers=self._workers,
            generator=torch.Generator().manual_seed(self._seed),
        )  # fmt: skip
        self.left_out = 0
        for batch in loader:
            if self._pairs and len(batch["labels"].unique()) == len(batch["labels"]):
                self.left_out += 1
                continue
            yield {name: tensor.to(self._device) for name, tensor in batch.items()}

    def __len__(self) -> int:
        return -(-len(self._dataset) // self._size)  # type: ignore[arg-type]
