"""The README's Python runs on models of timm and of transformers, and leaves a plain model and a task's file."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers

import gradsel
from tests.documentation.blocks import blocks
from tests.support import tiny

PYTHON = [block.code for block in blocks("README.md") if block.language == "python"]


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
