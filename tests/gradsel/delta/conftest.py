"""A file that several tests of deltas read."""

from __future__ import annotations

import pytest

from tests.gradsel.delta.cases import every_kind


@pytest.fixture
def path(tmp_path):
    every_kind().save(tmp_path / "d.delta")
    return tmp_path / "d.delta"
