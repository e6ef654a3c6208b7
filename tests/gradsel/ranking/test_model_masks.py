"""Masks of real model families equal a naive selection in every memory mode."""

from __future__ import annotations

import pytest
import torch

from gradsel.masks import Frozen, Whole
from gradsel.parameters.rules import parameter_rules
from tests.support.families import names_in
from tests.support.naive import POLICIES, Naive, select
from tests.support.zoo import ZOO, built


@pytest.mark.parametrize("name", ZOO)
def test_masks_equal_a_naive_selection_in_every_memory_mode(name):
    model, family = built(name), ZOO[name]
    without = set(names_in(family.no_gradient))
    limits = [8 * parameter.numel() for parameter in model.parameters()]  # a float32 gradient and its running sum
    some = max(*limits, sum(limits) // 4)
    runs = {
        "full": ([1, 2], {"memory": "full"}),
        "grouped": ([1, 2], {"max_gradient_bytes": some}),
        "streaming": ([1], {"memory": "streaming"}),
    }
    expected = {count: Naive(model, family.loss, [1, 2][:count]) for count in (1, 2)}
    for title, (policy, masks_of) in POLICIES.items():
        wanted = {count: masks_of(naive) for count, naive in expected.items()}
        for mode, (batches, options) in runs.items():
            selection = select(model, batches, family, policy, **options)
            assert selection.notes["memory"].startswith(mode)
            assert selection.notes.get("neurons that score zero", 0) == expected[len(batches)].silent
            for full, rule in parameter_rules(model).items():
                mask = selection[full]
                if rule.action == "whole":
                    assert isinstance(mask, Whole), full
                elif rule.action == "freeze" or full in without:
                    assert isinstance(mask, Frozen), full
                    assert mask.reason == ("no gradient" if full in without else rule.reason), full
                else:
                    assert torch.equal(mask.to_dense(), wanted[len(batches)][full]), (title, mode, full)
            assert set(wanted[len(batches)]) | without == {
                full for full, rule in parameter_rules(model).items() if rule.action == "rank"
            }
