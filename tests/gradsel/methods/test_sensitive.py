"""SPT's allocation, against the rule of its paper written out for every number of sensitive entries."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("timm")
from gradsel.masks import Frozen
from gradsel.methods import Context, Parts, method
from gradsel.methods.sensitive import SensitiveWithin
from gradsel.ranking.scores import Scores
from gradsel.views import NeuronView
from tests.support import tiny

SHAPES = {"a": (6, 8), "b": (30,), "c": (9, 5), "d": (4, 3, 2, 2)}
COSTS = {"a": 14, "c": 14}


def scores_of(name, values):
    view = NeuronView((0,))
    return Scores(view.of(values), SHAPES[name], view, squared=True)


def allocated(policy, values):
    sizes = {name: tuple(NeuronView((0,)).of(tensor).shape) for name, tensor in values.items()}
    ranking = policy.start(sizes)
    for name, tensor in values.items():
        ranking.add(name, scores_of(name, tensor))
    return ranking.finish()


def by_the_rule(values, most, alpha, beta):
    """The masks, what is adapted, and the count, of the best number of sensitive entries; the authors sweep it."""
    flat = torch.cat([tensor.flatten() for tensor in values.values()])
    order = flat.argsort(descending=True)
    found = {}
    for twentieths in range(1, 81):
        sensitive = torch.zeros_like(flat, dtype=torch.bool)
        sensitive[order[: math.ceil(most * twentieths / 20)]] = True
        masks, adapted = {}, []
        parts = sensitive.split([math.prod(shape) for shape in SHAPES.values()])
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True):
            own = part.view(shape)
            if name in COSTS and own.sum() >= COSTS[name] / alpha:
                adapted.append(name)
                own = torch.zeros_like(own)
            elif len(shape) == 1 and own.sum() >= shape[0] / beta:
                own = torch.ones_like(own)
            masks[name] = own
        total = sum(int(mask.sum()) for mask in masks.values()) + sum(COSTS[name] for name in adapted)
        found[abs(total - most), -twentieths] = masks, adapted
    return found[min(found)]


@pytest.mark.parametrize("most", [4, 20, 35, 60, 120])
@pytest.mark.parametrize("alpha", [1.0, 3.0, 10.0])
def test_entries_vectors_and_additions_are_allocated_by_the_rule(most, alpha):
    generator = torch.Generator().manual_seed(most)
    values = {name: torch.rand(shape, generator=generator) ** 4 for name, shape in SHAPES.items()}
    values["a"] *= 2
    expected, adapted = by_the_rule(values, most, alpha, 5.0)
    found = allocated(SensitiveWithin(most, COSTS, alpha), values)
    for name in SHAPES:
        assert torch.equal(found[name].to_dense(), expected[name]), name
    assert adapted == [n for n, mask in found.items() if isinstance(mask, Frozen) and mask.label == "adapted"]


LORA = method("spt-lora", budget=700, rank=1, batches=1)
ADAPTER = method("spt-adapter", budget=700, rank=1, batches=1)


@pytest.mark.parametrize(
    ("how", "cost"),
    [(LORA, lambda outputs, inputs: outputs + inputs), (ADAPTER, lambda outputs, inputs: 2 * outputs + 1 + outputs)],
    ids=["LoRA", "adapter"],
)
def test_sensitivity_is_the_squared_gradient_of_a_few_batches(how, cost):
    batches = tiny.images()
    model = tiny.vit()
    F.cross_entropy(model(batches[0]["pixel_values"]), batches[0]["labels"]).backward()
    frozen = ("patch_embed", "pos_embed", "cls_token", "head")
    squares = {n: p.grad.square() for n, p in model.named_parameters() if not n.startswith(frozen)}
    sizes = {n: tuple(NeuronView((0,)).of(g).shape) if g.ndim > 1 else (g.numel(), 1) for n, g in squares.items()}
    costs = {n: cost(*g.shape) for n, g in squares.items() if g.ndim == 2}
    ranking = SensitiveWithin(700 - 24, costs, 10.0).start(sizes)  # the class token counts
    for key, square in squares.items():
        view = NeuronView((0,)) if square.ndim > 1 else NeuronView(tuple(range(square.ndim)))
        ranking.add(key, Scores(view.of(square), tuple(square.shape), view, squared=True))
    expected = ranking.finish()
    found = how.prepare(tiny.vit(), batches, Context())
    for key, mask in found.selection.items():
        if key in expected:
            assert torch.equal(mask.to_dense(), expected[key].to_dense()), key
        else:
            assert mask.nnz == (mask.numel if key.startswith(("cls_token", "head")) else 0), key
    assert found.selection.notes["adapted"]
    head = 3 * 25
    assert found.trained - head == pytest.approx(700, abs=0.1 * 700)
    assert found.trained - head == 24 + sum(mask.nnz for mask in expected.values()) + sum(
        costs[f"{path}.weight"] for path in found.selection.notes["adapted"]
    )


def test_a_small_budget_has_no_additions_and_a_large_one_has():
    def adapted(budget):
        prepared = method("spt-lora", budget=budget, rank=2, alpha=2.0).prepare(tiny.vit(), tiny.images())
        return prepared.selection.notes["adapted"]

    assert not adapted(40)
    assert len(adapted(2000)) > 3


def test_a_budget_below_the_class_token_is_refused():
    with pytest.raises(ValueError, match="budget is 20, which the class token exceeds"):
        method("spt-lora", budget=20).prepare(tiny.vit(), tiny.images())


def test_a_token_of_the_head_does_not_count_to_the_budget():
    parts = Parts(head=("cls_token", "head.weight", "head.bias"))
    assert LORA.trained_on(tiny.vit(), parts=parts) == 24 + 3 * 25 + 700
    found = LORA.prepare(tiny.vit(), tiny.images(), Context(parts=parts))
    assert found.selection.notes["policy"] == str(SensitiveWithin(700))
