"""The benchmark of the step's targets: what it compares with is what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.optimizer import targets


def test_the_kernel_alone_does_the_steps_arithmetic():
    parameters, twins = ([torch.nn.Parameter(torch.ones(8, 1)) for _ in range(3)] for _ in range(2))
    for parameter in (*parameters, *twins):
        parameter.grad = torch.ones_like(parameter)
    adam = targets.gradsel.MaskedAdam(parameters)
    with torch.no_grad():
        targets.kernel_of(adam)()
        other = targets.gradsel.MaskedAdam(twins)
        for _ in range(3):
            other.step()
    assert all(map(torch.equal, parameters, twins))


def test_the_bare_loop_writes_the_selected_entries(tmp_path):
    if targets.compiler() is None:
        pytest.skip("there is no C++ compiler")
    weight, grad = torch.zeros(3, 5), torch.ones(3, 5)
    index = torch.tensor([[1, 3], [0, 4], [2, 3]], dtype=torch.int32)
    targets.bare_loop(tmp_path)([weight], [grad], [index], 2)()
    assert torch.equal(weight, torch.zeros(3, 5).scatter_(1, index.long(), -1e-6))


def test_measures_are_medians_over_pairs(capsys):
    """Differences by tensor; the last provider has the goal."""
    case = targets.Case("x", "s", "loop", {"a": lambda: None, "b": lambda: None}, {"over each": "<= 1 us a tensor"}, 10)
    rows = targets.measured(case, 3, torch.zeros(1))
    assert [(row["provider"], row["goal"]) for row in rows] == [("a", ""), ("b", "<= 1 us a tensor")]
    assert set(rows[0]) == set(targets.FIELDS)
    assert abs(float(rows[1]["measured"])) < 100
