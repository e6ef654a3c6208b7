"""pytest's part of the support matrix: the markers, the fixture ``refusal``, and the option ``--matrix``."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest

from tests.support import matrix

_KEY = "support matrix"


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write what the tests that run say about the support matrix to docs/support.csv and docs/support.md"
    parser.addoption("--matrix", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "supports(setting, *operations): both work together if the test passes")
    config.addinivalue_line("markers", "refuses(setting, *operations): they are refused, if the test passes")
    if config.getoption("matrix") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for kind, outcome in (("supports", matrix.WORKS), ("refuses", matrix.REFUSED)):
            for mark in item.iter_markers(kind):
                setting, *operations = mark.args
                matrix.check(setting, operations)
                item.user_properties += [(_KEY, (setting, operation, outcome)) for operation in operations]


class Refusal:
    """What the fixture ``refusal`` is. ``with refusal(ValueError, match="..."):`` is ``pytest.raises``."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.request = request

    @contextmanager
    def __call__(self, error, match):
        with pytest.raises(error, match=match) as caught:
            yield caught
        self.saw(str(caught.value))

    def saw(self, message: str) -> None:
        """For a message that was caught elsewhere, as in another process. Fails if the committed page has another."""
        message = matrix.one_sentence(message)
        self.request.node.user_properties.append((f"{_KEY}: message", message))
        if not self.request.config.getoption("matrix"):
            test = _without_parameters(self.request.node.nodeid)
            committed = {record.message for record in matrix.load() if record.test == test}
            assert message in committed, f"docs/support.md has other messages: run pytest --matrix {test}"


@pytest.fixture
def refusal(request: pytest.FixtureRequest) -> Refusal:
    """In place of ``pytest.raises`` in tests marked ``refuses``: keeps the message for the support matrix."""
    return Refusal(request)


class _Collector:
    """Gathers the outcomes of a run; with pytest-xdist, in the process that started the others."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.records: set[matrix.Record] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not (report.skipped or (report.when == "call" and report.passed)):
            return
        found = [value for key, value in report.user_properties if key == _KEY]
        messages = [value for key, value in report.user_properties if key == f"{_KEY}: message"]
        test = _without_parameters(report.nodeid)
        for setting, operation, outcome in found:
            if report.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
                said = [re.sub("^Skipped: ", "", reason)]
                outcome = matrix.NOT_RUN
            else:
                said = messages if outcome == matrix.REFUSED else [""]
            if not said:
                raise pytest.UsageError(f"{test} is marked refuses(), but does not use the fixture refusal")
            self.records |= {matrix.Record(setting, operation, test, outcome, message) for message in said}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.written = exitstatus == pytest.ExitCode.OK
        if self.written:
            matrix.save(matrix.merged(matrix.load(), self.records, matrix.claims()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        done = f"written to {matrix.RECORDS}" if self.written else "not written, because not all tests passed"
        terminalreporter.write_line(f"support matrix: {len(self.records)} findings {done}")


def _without_parameters(nodeid: str) -> str:
    return nodeid.partition("[")[0]
