"""The recipe: the learning rate by step, and mixing."""

from __future__ import annotations

import math

import pytest
import torch

from gradsel.methods import method
from gradsel.training import RecipeConfig
from gradsel.training.recipe import Recipe


def recipe(name="gps", **settings):
    return Recipe(RecipeConfig(**{"epochs": 10, "learning_rate": 1.0, **settings}), method(name), 3)


def test_gps_warms_up_inside_the_epochs():
    how = recipe()
    assert (how.epochs, how.warmup_epochs) == (10, 1)
    rates = [how.rate_at(step, 100) for step in range(100)]
    assert rates[0] == 1e-7
    assert rates[5] == pytest.approx(0.5, rel=1e-6)
    assert rates[10] == max(rates) == 1.0
    assert rates[55] == pytest.approx(0.5, rel=1e-6)
    assert rates[99] == pytest.approx((1 + math.cos(math.pi * 89 / 90)) / 2, abs=1e-7)
    assert how.rate_at(100, 100) == pytest.approx(1e-8)


def test_grft_warms_up_before_them():
    how = recipe("grft", warmup_epochs=2.0)
    assert (how.epochs, how.warmup_epochs) == (12, 2)
    assert how.rate_at(20, 120) == 1.0
    assert recipe("gps", warmup="before").epochs == 11


def test_epochs_of_cooling_down_keep_the_last_rate():
    how, plain = recipe(cooldown_epochs=5), recipe()
    assert how.epochs == 15
    assert [how.rate_at(step, 150) for step in range(100)] == [plain.rate_at(step, 100) for step in range(100)]
    assert {how.rate_at(step, 150) for step in range(100, 150)} == {1e-8}
    assert recipe("grft", warmup_epochs=2.0, cooldown_epochs=3).epochs == 15


def test_without_warm_up_it_begins_at_the_peak():
    assert recipe(warmup_epochs=0.0).rate_at(0, 10) == 1.0
    with pytest.raises(ValueError, match=r"recipe\.warmup_epochs is 10, which leaves nothing of the 10 epochs"):
        recipe(warmup_epochs=10.0)


def test_the_rate_is_the_methods_unless_it_is_given():
    assert recipe("linear", learning_rate=None).rate == method("linear").rate
    assert recipe("linear").rate == 1.0


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_mixed_images_have_mixed_labels(settings):
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    inputs, soft = recipe(**settings).mix({"pixel_values": images}, labels)
    assert soft.shape == (6, 3)
    assert torch.allclose(soft.sum(1), torch.ones(6))
    assert inputs["pixel_values"].shape == images.shape
    assert not torch.equal(inputs["pixel_values"], images)
    assert float(recipe(**settings).loss(torch.randn(6, 3), soft)) > 0


def test_label_smoothing_is_torchs():
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(recipe(label_smoothing=0.1).loss(logits, labels), expected)
    assert not recipe().mixes
