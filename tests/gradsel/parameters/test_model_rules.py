"""Rules and blocks of real model families."""

from __future__ import annotations

import pytest

from gradsel.parameters.blocks import block_names
from gradsel.parameters.rules import parameter_rules
from tests.support.families import expected_rules, fits, names_in
from tests.support.zoo import ZOO, built


@pytest.mark.parametrize("name", ZOO)
def test_rules(name):
    model = built(name)
    rules = parameter_rules(model)
    expected = expected_rules(ZOO[name])
    for full, rule in rules.items():
        fitting = [pattern for pattern in expected if fits(full, pattern)]
        assert [expected[pattern] for pattern in fitting] == [(rule.action, rule.reason)], full
    assert {pattern for pattern in expected if any(fits(full, pattern) for full in rules)} == set(expected)
    assert list(rules) == [full for full, _ in model.named_parameters()]


@pytest.mark.parametrize("name", ZOO)
def test_blocks(name):
    assert block_names(built(name)) == names_in(ZOO[name].blocks)
