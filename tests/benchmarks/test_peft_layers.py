"""The benchmark of PEFT's sparse layers: both contenders train the same, and their rows have all columns."""

from __future__ import annotations

import pytest

from benchmarks.training import peft_layers


@pytest.mark.parametrize("size", peft_layers.SMALL)
@pytest.mark.parametrize("adapter", peft_layers.CONFIGS)
def test_rows(size, adapter, capsys):
    theirs, ours = peft_layers.rows(size, peft_layers.SMALL[size], adapter, rounds=2)
    assert (theirs["provider"], ours["provider"]) == ("PEFT", "accelerated")
    assert theirs["ratio"] == "1.000"
    assert 0 < ours["trained"] == theirs["trained"]
    assert ours["saved_bytes"] > 0
    assert set(ours) == set(theirs) == set(peft_layers.FIELDS)
