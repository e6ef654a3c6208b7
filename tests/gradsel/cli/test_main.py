"""The command line's own options."""

from __future__ import annotations

import pytest

import gradsel
from gradsel.cli import main as cli


def test_config_and_version(capsys):
    assert cli.main(["config"]) == 0
    assert "gradsel_kernels" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert gradsel.__version__ in capsys.readouterr().out
