"""Every block of Python in docs/transformers.md runs as it stands, one after the other, as in one session."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

import gradsel
from tests.support import hub, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "right")
    real = transformers.TrainingArguments

    def quick(*args, **kwargs):
        return real(*args, **kwargs, use_cpu=True, report_to="none", disable_tqdm=True)

    monkeypatch.setattr(transformers, "TrainingArguments", quick)
    torch.manual_seed(0)
    transformers.BertModel(tiny.bert_config()).save_pretrained(tmp_path / "base")
    rows = torch.randint(1, 60, (16, 6))
    data = [{"input_ids": row, "labels": number % 3} for number, row in enumerate(rows)]
    space = {"name": str(tmp_path / "base"), "train_data": data}
    with hub.used_by_all(monkeypatch, tmp_path / "cache") as repos:
        for code in BLOCKS:
            exec(compile(code, "docs/transformers.md", "exec"), space)
    assert len(BLOCKS) == 5
    assert set(repos["user/birds"]) == {"gradsel.delta", "README.md"}
    assert gradsel.attached.is_attached(space["model"])
    plain, tuned = space["plain"].state_dict(), gradsel.detach(space["model"]).state_dict()
    assert all(torch.equal(tensor, tuned[key]) for key, tensor in plain.items())
    assert space["trainer"].state.global_step == 6
    assert sorted(path.name for path in Path("runs/birds").iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_names_in_the_text_exist():
    from gradsel.integrations import transformers as ours

    for called in re.findall(r"`gradsel\.([\w.]+)", PAGE):
        found = gradsel
        for part in called.split("."):
            found = ours if (found, part) == (gradsel.integrations, "transformers") else getattr(found, part)
    assert set(ours.__all__) <= set(re.findall(r"\w+", PAGE))
