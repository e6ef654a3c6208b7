"""The papers' augmentations, and random numbers that depend on seed, epoch and sample alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment

from gradsel.training import DataConfig
from gradsel.training.augmentation import fgvc, randaugment, seeded, strong
from gradsel.training.datasets import Images, datasets_of, transforms
from gradsel.training.models import ImageInput, Loaded
from gradsel.training.splits import Split

INPUT = ImageInput((16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def image(size=(40, 36)):
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_everything_random_is_seeded_and_goes_on_afterwards():
    def drawn():
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    inside = []
    for seed, epoch, index in ((1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        with seeded(seed, epoch, index):
            inside.append(drawn())
    assert inside[0] == inside[1]
    assert len(set(inside)) == 4
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = [drawn(), drawn()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert drawn() == expected[0]
    with seeded(1, 2, 3):
        drawn()
    assert drawn() == expected[1]


@pytest.mark.parametrize("make", [fgvc, randaugment, strong])
def test_views_are_random_but_repeatable(make):
    transform = make(INPUT)
    views = []
    for index in (0, 0, 1):
        with seeded(0, 0, index):
            views.append(transform(image()))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert views[0].shape == (3, 16, 16)


def test_the_strongest_posterising_is_black():
    """timm keeps no bit of an image then, which Pillow refuses from version 13 on."""
    (step,) = (step for step in randaugment(INPUT).transforms if isinstance(step, RandAugment))
    (posterise,) = (op for op in step.ops if op.name == "PosterizeIncreasing")
    posterise.prob, posterise.magnitude_std = 1.0, 0.0
    brightest = {}
    for posterise.magnitude in (0, 7.5, 10):
        brightest[posterise.magnitude] = max(high for _, high in posterise(image()).getextrema())
    assert brightest == {0: 240, 7.5: 128, 10: 0}


def test_crops_are_small_and_colours_stay_on_fgvc_but_not_in_strong_views():
    flat = Image.new("RGB", (64, 64), (200, 100, 50))
    expected = (torch.tensor([200, 100, 50]) / 255 - torch.tensor(INPUT.mean)) / torch.tensor(INPUT.std)
    changed = {fgvc: 0, strong: 0}
    for make in changed:
        for index in range(30):
            with seeded(0, 0, index):
                view = make(INPUT)(flat)
            changed[make] += not torch.allclose(view[:, 8, 8], expected, atol=1e-2)
    assert changed[fgvc] == 0
    assert changed[strong] >= 20
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    spans = []
    for index in range(30):
        with seeded(0, 0, index):
            view = fgvc(INPUT)(ramp)[0]
        spans.append(float((view.max() - view.min()) * INPUT.std[0]))
    assert min(spans) < 0.45  # a crop of half of the area has 0.7 of the width
    assert max(spans) > 0.8


def test_direct_resize_sees_the_whole_image_the_centre_does_not():
    wide = image((64, 32))
    stripes = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))).convert("RGB")
    seen = transforms(INPUT, "crop")[1](stripes)[0] * INPUT.std[0] + INPUT.mean[0]
    width = float(seen[8, -1] - seen[8, 0]) * 255 / 4
    assert 0.4 * 64 < width < 0.5 * 64  # of a square; with the ratio of the sides lost, it would be 0.9
    whole = {name: transforms(INPUT, name)[1](wide) for name in ("none", "crop", "fgvc")}
    assert torch.equal(whole["none"], transforms(INPUT, "none")[0](wide))
    assert torch.equal(whole["crop"], whole["fgvc"])
    assert not torch.equal(whole["none"], whole["crop"])


@pytest.mark.parametrize(
    ("augmentation", "selection", "views"),
    [("none", "same", None), ("none", "strong", 2), ("crop", "same", 2), ("fgvc", "strong", 2)],
)
def test_weights_are_ranked_on_the_views_that_are_asked_for(tmp_path, augmentation, selection, views):
    image().save(tmp_path / "x.png")
    splits = {"train": Split([str(tmp_path / "x.png")], [0])}
    config = DataConfig(augmentation=augmentation, selection_augmentation=selection)
    data, ranking, has_views = datasets_of(splits, Loaded(torch.nn.Identity(), "timm", image=INPUT), config, 3)
    assert isinstance(ranking, Images)
    assert (ranking.views, has_views) == (views, views is not None)
    pixels = ranking[0]["pixel_values"]
    if selection == "same":
        first = pixels if views is None else pixels[0]
        assert torch.equal(first, data["train"][0]["pixel_values"])
    else:
        with seeded(3, 0, 0):
            assert torch.equal(pixels[0], strong(INPUT)(image()))
