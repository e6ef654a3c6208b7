"""The vision transformer: published parameter counts, timm's names, its attention and its features."""

from __future__ import annotations

import math

import pytest
import torch

import gradsel
from gradsel.papers.vit import VisionTransformer, vit_base_patch16_224
from tests.support.vit import small


def test_vit_base_has_the_published_counts():
    classes = 10
    model = vit_base_patch16_224(classes)
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    assert backbone == 85_798_656
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(1), "random", progress=False)
    assert selection.trainable_count() == 83_712 + 83_712 + 769 * classes


def test_parameters_have_timms_names():
    block = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")]  # fmt: skip
    assert [name for name, _ in small().named_parameters()] == [
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        *(f"blocks.{i}.{name}" for i in range(2) for name in block),
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    ]  # fmt: skip


def test_features_are_the_class_token_behind_the_norm():
    model, images = small(), torch.randn(3, 1, 8, 8)
    features = model.forward_features(images)
    assert features.shape == (3, 8)
    torch.testing.assert_close(features.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.head(features), model(images))


def test_attention_mixes_tokens_head_by_head():
    attention, x = small().blocks[0].attn, torch.randn(2, 5, 8)
    q, k, v = (part.unflatten(2, (2, 4)) for part in attention.qkv(x).chunk(3, dim=2))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(math.sqrt(4)).softmax(-1)
    expected = attention.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
    torch.testing.assert_close(attention(x), expected)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"patch .*image_size.*3 and 8"):
        VisionTransformer(8, 3)
    with pytest.raises(ValueError, match=r"heads .*dim.*5 and 768"):
        VisionTransformer(heads=5)
