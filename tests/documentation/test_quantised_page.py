"""The code of docs/quantised.md runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support.quantised import batch, dense_net, loss, quantised_net

PAGE = Path(__file__).parents[2] / "docs" / "quantised.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    base = quantised_net("nf4")
    names = {
        "model": quantised_net("nf4"), "base": base, "original": dense_net(base), "torch": torch,
        "batches": [batch(1), batch(2)], "loss": loss,
    }  # fmt: skip
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "differences merged" in capsys.readouterr().out
    assert type(base.up) is torch.nn.Linear
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
