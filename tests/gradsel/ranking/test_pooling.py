"""Pooled features by family, and the contrastive loss that refuses what is not pooled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from tests.support import tiny
from tests.support.hugging_face import hugging_face


def test_timm_models_are_pooled():
    timm = pytest.importorskip("timm")
    model, (batch, _) = tiny.vit(), tiny.images()
    found = gradsel.features(model)(model, batch["pixel_values"])
    assert found.shape == (8, 24)
    assert torch.allclose(model.head(model.fc_norm(found)), model(batch["pixel_values"]))
    convnext = timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)).eval()
    found = gradsel.features(convnext)(convnext, {"pixel_values": batch["pixel_values"]})
    assert torch.allclose(convnext.head.fc(found), convnext(batch["pixel_values"]), atol=1e-6)


def test_bert_has_its_pooler():
    model, (_, batch) = tiny.bert(), tiny.texts()
    found = gradsel.features(model)(model, {name: batch[name] for name in ("input_ids", "attention_mask")})
    assert torch.allclose(model.classifier(found), model(**batch).logits)


@pytest.mark.parametrize("name", ["ViT", "ConvNeXt"])
def test_vision_models_of_transformers(name):
    model, inputs = hugging_face(name)
    model.eval()
    found = gradsel.features(model)(model, inputs[0][0])
    assert torch.allclose(model.classifier(found), model(inputs[0][0]).logits, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_llama_has_the_last_real_token(side):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config).eval()
    ids = torch.randint(1, 50, (4, 7))
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0
    if side == "left":
        mask = mask.flip(1)
    ids = ids * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    found = gradsel.features(model)(model, batch)
    assert torch.allclose(model.score(found), model(**batch).logits, atol=1e-6)
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    assert torch.allclose(gradsel.features(model)(model, embedded), found, atol=1e-6)


def test_any_other_model_has_the_input_of_its_head():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.body(x).relu())

    model, x = Plain(), torch.randn(3, 5)
    assert torch.equal(gradsel.features(model)(model, x), model.body(x).relu())
    with pytest.raises(ValueError, match="no features are known for Linear"):
        gradsel.features(nn.Linear(2, 2))


def test_tokens_are_not_views():
    pytest.importorskip("timm")
    model, (batch, _) = tiny.vit(), tiny.images()
    pair = (batch["pixel_values"], batch["labels"])
    with pytest.raises(ValueError, match=r"\[batch, dim\], got \[8, 17, 24\].*gradsel.features.*views=True"):
        gradsel.contrastive("forward_features")(model, pair)
    with pytest.raises(ValueError, match=r"\[batch, views, dim\], got \[8, 24\]"):
        gradsel.contrastive(gradsel.features(model), views=True)(model, pair)
    with pytest.raises(ValueError, match="leave out augment"):
        gradsel.contrastive(augment=lambda x: x, views=True)
    loss = gradsel.contrastive()(model, pair)
    expected = gradsel.SupConLoss()(gradsel.features(model)(model, pair[0]), pair[1])
    assert torch.equal(loss, expected)
    viewed = gradsel.contrastive(lambda model, x: torch.stack([model.forward_head(model.forward_features(x),
                                 pre_logits=True)] * 2, 1), views=True)(model, pair)  # fmt: skip
    assert torch.equal(viewed, gradsel.contrastive(augment=lambda x: x)(model, pair))
