"""The papers' augmentations, by timm, and randomness that depends on a seed alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

from gradsel.training.models import ImageInput

#: Crops by area and by ratio of the sides, as in SSF (Lian et al., NeurIPS 2022), whose preprocessing GPS follows.
_CROPS: dict[str, Any] = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "interpolation": "random"}

_PRIMES = (1_000_003, 7_919)


def fgvc(image: ImageInput) -> Callable[[Any], Tensor]:
    """Training on FGVC: crops of 8 to 100 % of the area, resized bilinearly or bicubically at random, and flips."""
    return _timm(image, color_jitter=None)


def randaugment(image: ImageInput) -> Callable[[Any], Tensor]:
    """Training as SSF does it on the whole CIFAR-100: the crops and flips of :func:`fgvc`, RandAugment (Cubuk et al.,
    2020) of strength 9, and a patch erased in a quarter of the images."""
    from timm.data.auto_augment import RandAugment

    made: Any = _timm(image, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")
    for op in (op for step in made.transforms if isinstance(step, RandAugment) for op in step.ops):
        if op.name == "PosterizeIncreasing":
            op.aug_fn = _posterize
    found: Callable[[Any], Tensor] = made
    return found


def _posterize(image: Any, bits: int, **options: Any) -> Any:
    """Keeps so many bits of each channel. At its highest level timm asks for none: black, which Pillow refuses."""
    from PIL import ImageOps

    return ImageOps.posterize(image, bits) if bits else image.point(lambda value: 0)


def strong(image: ImageInput) -> Callable[[Any], Tensor]:
    """The views that GPS's authors rank weights on: the crops and flips of :func:`fgvc`, colours changed in 80 % of the
    images, and 20 % in grey (as in Khosla et al., 2020)."""
    return _timm(image, color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.8, grayscale_prob=0.2)


def centre(image: ImageInput) -> Callable[[Any], Tensor]:
    """Testing: the shorter side is resized, with its ratio to the other kept, and the centre is cut out."""
    from timm.data import create_transform

    made: Callable[[Any], Tensor] = create_transform(
        (3, *image.size), interpolation=interpolation(image), mean=image.mean, std=image.std, crop_pct=image.crop
    )
    return made


def interpolation(image: ImageInput) -> str:
    """How images are resized, as torchvision calls it."""
    return image.interpolation if image.interpolation in ("bilinear", "bicubic") else "bicubic"


def _timm(image: ImageInput, **options: Any) -> Callable[[Any], Tensor]:
    from timm.data import create_transform

    made: Callable[[Any], Tensor] = create_transform(
        (3, *image.size), is_training=True, mean=image.mean, std=image.std, **_CROPS, **options
    )
    return made


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Around the augmentation of one sample: the random numbers of torch, numpy and Python depend on these three alone.

    Afterwards they go on as if nothing had been.
    """
    drawn = ((seed * _PRIMES[0] + epoch) * _PRIMES[1] + index) % 2**63
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(drawn)
        random.seed(drawn)
        numpy.random.seed(drawn % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)
