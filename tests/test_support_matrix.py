"""The support matrix in the documentation is what the tests say."""

from __future__ import annotations

import pytest

from tests.support import matrix

pytest_plugins = ["pytester"]
HOW = "run python -m pytest --matrix with the tests that are named, and commit docs/support.csv and docs/support.md"


def test_every_marker_has_its_record_and_every_record_its_marker():
    recorded = {record.claim for record in matrix.load()}
    assert matrix.claims() == recorded, HOW


def test_the_page_shows_the_records():
    assert (matrix.ROOT / matrix.PAGE).read_text() == matrix.page(matrix.load()), HOW


RUN = """
import pytest

@pytest.mark.supports("DDP", "attach", "MaskedAdam")
@pytest.mark.parametrize("x", [1, 2])
def test_works(x): pass

@pytest.mark.refuses("int8", "attach")
def test_refused(refusal):
    with refusal(ValueError, match="8 bits"):
        raise ValueError("fc1.weight has 8 bits")

@pytest.mark.supports("CUDA", "select")
def test_skipped():
    pytest.skip("there is no GPU")
"""


@pytest.fixture
def written(pytester, monkeypatch):
    """Runs tests with ``--matrix``, and gives back the records: there were some of a test that does not run now."""
    monkeypatch.setattr(matrix, "ROOT", pytester.path)
    for folder in ("docs", "tests"):
        pytester.mkdir(folder)
    (pytester.path / "tests" / "test_other.py").write_text('@pytest.mark.supports("AWQ", "delta")\ndef test(): pass\n')
    matrix.save(matrix.Record("AWQ", "delta", f"tests/test_{name}.py::test", "works", "") for name in ("other", "old"))

    def run(text: str) -> list[matrix.Record]:
        (pytester.path / "tests" / "test_it.py").write_text(text)
        pytester.inline_run("--matrix", "-p", "tests.support.matrix_plugin", "tests/test_it.py")
        return matrix.load()

    return run


def test_outcomes_are_written(written):
    found = {(record.setting, record.operation, record.outcome, record.message) for record in written(RUN)}
    assert found == {
        ("DDP", "attach", "works", ""),
        ("DDP", "MaskedAdam", "works", ""),
        ("int8", "attach", "refused", "fc1.weight has 8 bits"),
        ("CUDA", "select", "not run", "there is no GPU"),
        ("AWQ", "delta", "works", ""),
    }
    text = (matrix.ROOT / matrix.PAGE).read_text()
    assert "| **int8** | untested | refused | untested |" in text
    assert r"| int8 | attach | fc1.weight has 8 bits |" in text


def test_a_failing_test_writes_nothing(written):
    found = written(RUN + "\ndef test_fails(): assert False\n")
    assert {record.setting for record in found} == {"AWQ"}


@pytest.mark.parametrize("marker", ['supports("DDP2", "attach")', 'refuses("DDP", "train")', 'supports("DDP")'])
def test_unknown_names_are_refused(marker, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(f"@pytest.mark.{marker}\ndef test(): pass\n")
    with pytest.raises(ValueError, match=r"the (support )?matrix"):
        matrix.claims()
