"""Every block of code in the README runs as it stands, on models of timm and of transformers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import transformers

import gradsel
from gradsel.cli import main as cli
from tests.support import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def timm_vit():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **tiny.VIT)
    size = model.patch_embed.img_size
    return model, [(torch.randn(6, 3, *size), torch.arange(6) % 3) for _ in range(2)]


def bert():
    model = transformers.BertForSequenceClassification(tiny.bert_config())
    tokens = torch.randint(5, 12, (6, 8))
    return model, [({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, torch.arange(6) % 2)] * 2


@pytest.mark.parametrize("make", [timm_vit, bert], ids=["timm", "transformers"])
@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_runs(code, make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, loader = make()
    exec(compile(code, "README", "exec"), {"model": model, "loader": loader})
    if "model" in code:
        assert not gradsel.attached.is_attached(model)
        assert len(gradsel.Delta.load("birds.safetensors")) > 0


def test_commands_exist():
    lines = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(lines) > 4
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        if program == "gradsel":
            assert cli.parser(words).parse_args(words).command
        elif program == "make":
            assert set(words) <= set(targets)
        else:
            assert (program, words[0]) == ("pip", "install")
    assert set(re.findall(r"`make (\w+)`", README)) <= set(targets)


def test_the_first_command_is_a_whole_configuration(capsys):
    line = next(line for _, code in BLOCKS for line in code.splitlines() if line.startswith("gradsel finetune"))
    assert cli.main([*shlex.split(line)[1:], "--print-config"]) == 0
    assert "path: birds/" in capsys.readouterr().out
