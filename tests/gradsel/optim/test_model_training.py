"""A training step on real model families changes what is selected and nothing else."""

from __future__ import annotations

import copy
import warnings

import pytest

import gradsel
from tests.support.naive import POLICIES, Naive, select
from tests.support.zoo import ZOO, built


@pytest.mark.parametrize("title", ["PerNeuron", "Columns"])
@pytest.mark.parametrize("name", ZOO)
def test_a_step_of_training_changes_what_is_selected_and_nothing_else(name, title):
    model, family = copy.deepcopy(built(name)), ZOO[name]
    selection = select(model, [1], family, POLICIES[title][0])
    before = {full: parameter.detach().clone() for full, parameter in model.named_parameters()}
    report = gradsel.attach(model, selection)
    assert set(report) == set(before)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*selected weights got no gradient")
        family.loss(model, 1).backward()
        optimizer.step()
    gradsel.detach(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    naive = Naive(model, family.loss, [1])
    for full, mask in selection.items():
        changed = after[full] != before[full]
        assert not bool((changed & ~mask.to_dense()).any()), full
        if mask.nnz and not mask.is_whole:
            assert bool(changed.any()) or not bool(naive.scores[full].any()), full
