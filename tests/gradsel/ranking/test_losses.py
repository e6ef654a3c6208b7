"""SupConLoss against the equation written out as loops."""

from __future__ import annotations

import math

import pytest
import torch

from gradsel import SupConLoss


def by_hand(features, labels, temperature):
    """Equation 2 of Khosla et al. 2020 (L_out), over anchors that have a positive."""
    z = [f / f.norm() for f in features]
    losses = []
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        total = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in range(len(z)) if a != i)
        terms = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / total) for p in positives]
        losses.append(-sum(terms) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_the_equation(temperature):
    features = torch.randn(9, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 1, 3, 0, 2])  # class 3 has one sample, which is no anchor
    loss = SupConLoss(temperature)(features, labels)
    assert float(loss) == pytest.approx(by_hand(features, labels.tolist(), temperature), rel=1e-12)


def test_views_are_samples_of_the_same_class():
    features = torch.randn(4, 3, 6)
    labels = torch.tensor([0, 1, 2, 1])
    flat = SupConLoss()(features.reshape(12, 6), labels.repeat_interleave(3))
    assert torch.equal(SupConLoss()(features, labels), flat)


def test_gradient():
    features = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda f: SupConLoss(0.3)(f, labels), features)


def test_scale_of_features_does_not_matter_and_half_precision_is_computed_in_float32():
    features = torch.randn(8, 4)
    labels = torch.arange(8) % 2
    loss = SupConLoss()(features, labels)
    assert torch.allclose(SupConLoss()(100 * features, labels), loss)
    half = SupConLoss()(features.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert torch.equal(half, SupConLoss()(features.bfloat16().float(), labels))


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.randn(4), torch.zeros(4), r"\[batch, dim\] or \[batch, views, dim\]"),
        (torch.randn(4, 3), torch.zeros(5), r"labels .*\[4\]"),
        (torch.randn(4, 3), torch.arange(4), "4 samples .*class"),
    ],
)
def test_bad_input(features, labels, message):
    with pytest.raises(ValueError, match=message):
        SupConLoss()(features, labels)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match=r"temperature .*0"):
        SupConLoss(0)
