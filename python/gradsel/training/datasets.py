"""Data sets for the loop: images, augmented as seed, epoch and sample say, and tokenised texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradsel.errors import RunError
from gradsel.training.augmentation import centre, fgvc, interpolation, randaugment, seeded, strong
from gradsel.training.config import DataConfig
from gradsel.training.models import ImageInput, Loaded
from gradsel.training.processes import ALONE, Processes
from gradsel.training.splits import Split, Stored

Sample = dict[str, Any]


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
        with seeded(self.seed, self.epoch, index):
            if self.views is None:
                pixels = self.transform(image)
            else:
                pixels = torch.stack([self.transform(image) for _ in range(self.views)])
        return {"pixel_values": pixels, "labels": self.split.labels[index]}


def open_image(given: str | Stored) -> Any:
    """An image in RGB.

    Args:
        given: a path, or an image in a data set of a library.

    Raises:
        RunError: it cannot be read.
    """
    from PIL import Image

    try:
        if isinstance(given, Stored):
            return given.open().convert("RGB")
        with Image.open(given) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises whatever its decoders do
        raise RunError(f"{given} cannot be read as an image ({type(error).__name__})") from None


def transforms(image: ImageInput, augmentation: str) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """What is done to images in training, and in testing."""
    from torchvision.transforms import v2

    how = v2.InterpolationMode(interpolation(image))
    end = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(image.mean), list(image.std)),
    ]
    size = list(image.size)
    direct = v2.Resize(size, interpolation=how)
    if augmentation in ("fgvc", "randaugment"):
        return (fgvc if augmentation == "fgvc" else randaugment)(image), centre(image)
    if augmentation == "crop":
        crops = v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=how)
        return v2.Compose([crops, v2.RandomHorizontalFlip(), *end]), centre(image)
    flips = [v2.RandomHorizontalFlip()] if augmentation == "flip" else []
    return v2.Compose([direct, *flips, *end]), v2.Compose([direct, *end])


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
    chosen = strong(loaded.image) if config.selection_augmentation == "strong" else training
    views = config.selection_augmentation == "strong" or config.augmentation != "none"
    return images, Images(splits["train"], chosen, seed, 2 if views else None), views


class SelectionBatches:
    """Batches to select on: shuffled by the seed, the same in every pass, on the device.

    Without views, a batch in which every class occurs once has no pair to compare; it is left out and counted.

    Attributes:
        left_out: batches without a pair, in the last pass.
        dataset: what they are made of.
    """

    def __init__(
        self, dataset: Dataset[Sample], size: int, collate: Callable[..., dict[str, Tensor]],
        device: torch.device, seed: int, workers: int = 0, pairs: bool = True, processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        """
        Args:
            pairs: whether the loss needs two samples of a class in every batch.
            processes: among which the batches are shared out; together they are those of a single process.
        """
        self.dataset, self._size, self._collate, self._device = dataset, size, collate, device
        self._seed, self._workers, self._pairs, self._processes = seed, workers, pairs, processes
        self.left_out = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        length = len(self.dataset)  # type: ignore[arg-type]
        order = torch.randperm(length, generator=torch.Generator().manual_seed(self._seed)).tolist()
        loader = DataLoader(
            self.dataset, batch_sampler=self._processes.share(batches_of(order, self._size)),
            collate_fn=self._collate, num_workers=self._workers, generator=torch.Generator().manual_seed(self._seed),
        )  # fmt: skip
        self.left_out = 0
        for batch in loader:
            if self._pairs and len(batch["labels"].unique()) == len(batch["labels"]):
                self.left_out += 1
                continue
            yield {name: tensor.to(self._device) for name, tensor in batch.items()}
        if 0 < self.left_out == len(self) and self._processes.count == 1:
            raise RunError(
                f"recipe.batch_size: no batch to select on, of {self.left_out}, has two samples of a class, which the "
                "contrastive loss compares; pass a larger --batch-size, or --selection-loss cross-entropy"
            )

    def __len__(self) -> int:
        return len(self._processes.share(batches_of(range(len(self.dataset)), self._size)))  # type: ignore[arg-type]


def batches_of(samples: Sequence[int], size: int) -> list[list[int]]:
    """The numbers of the samples of each batch; the last may be smaller."""
    return [list(samples[start : start + size]) for start in range(0, len(samples), size)]
