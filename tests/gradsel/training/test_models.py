"""Models by name: timm, transformers, local folders, and what is refused."""

from __future__ import annotations

import os
import shutil

import pytest
import timm
import torch
import transformers

from gradsel.parameters.rules import HEAD
from gradsel.training import ModelConfig
from gradsel.training.models import load_model, logits_of
from tests.support import tiny

CLASSES = ["a", "b", "c"]


def load(name, kind="images", weights="none", **options):
    size = options.pop("image_size", None)
    return load_model(ModelConfig(name=str(name), weights=weights, **options), CLASSES, kind, 3, size)


def test_timm_by_name_with_a_seeded_head():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    models = [load(name, options=tiny.VIT) for name in ("timm/vit_tiny_patch16_224", "vit_tiny_patch16_224")]
    assert torch.equal(torch.get_rng_state(), before)
    for loaded in models:
        assert (loaded.family, loaded.image.size, loaded.head) == ("timm", (32, 32), ("head",))
        assert loaded.model.head.out_features == 3
    assert all(torch.equal(a, b) for a, b in zip(*(m.model.parameters() for m in models), strict=True))


def test_the_size_of_images_is_passed_on_or_not_needed():
    options = {name: value for name, value in tiny.VIT.items() if name != "img_size"}
    vit = load("vit_tiny_patch16_224", options=options, image_size=48)
    assert vit.image.size == (48, 48)
    assert vit.model.patch_embed.img_size == (48, 48)
    small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}
    convnext = load("convnext_atto", options=small, image_size=64, drop_path=0.1)
    assert convnext.image.size == (64, 64)
    assert logits_of(convnext.model, {"pixel_values": torch.randn(2, 3, 64, 64)}).shape == (2, 3)
    assert convnext.head == ("head.fc",)


def test_a_local_folder_of_timm(tmp_path):
    model = tiny.vit(classes=5)
    timm.models.save_for_hf(model, str(tmp_path), model_args=tiny.VIT)
    loaded = load(tmp_path, weights="pretrained")
    assert loaded.family == "timm"
    assert torch.equal(loaded.model.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert loaded.model.head.out_features == 3


def test_a_local_folder_of_transformers_and_what_is_new_in_it(bert, tmp_path):
    loaded = load(bert, "texts", "pretrained")
    assert loaded.family == "transformers"
    assert loaded.positions == 32
    assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    base = transformers.BertModel.from_pretrained(bert)
    assert torch.equal(loaded.model.bert.pooler.dense.weight, base.pooler.dense.weight)
    assert "bert.pooler.dense" not in loaded.head

    transformers.BertModel(tiny.bert_config(), add_pooling_layer=False).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    fresh = load(tmp_path, "texts", "pretrained")
    assert set(HEAD) | {"bert.pooler.dense", "classifier"} <= set(fresh.head)


def test_images_by_transformers(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    loaded = load(tmp_path, weights="pretrained")
    assert loaded.image.size == (16, 16)
    assert logits_of(loaded.model, {"pixel_values": torch.randn(2, 3, 16, 16)}).shape == (2, 3)


def test_a_language_model_gets_a_padding_token(bert, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path, "texts", "pretrained")
    assert loaded.tokenizer.pad_token == "[SEP]"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    batch = dict(loaded.tokenizer(["the fine", "the great warm thing"], padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    assert logits_of(loaded.model.eval(), batch).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bert, tmp: load(bert, "images"), "bert.* is not a model for images"),
        (lambda bert, tmp: load(bert, "texts", drop_path=0.1), r"model\.drop_path: .* has no drop path"),
        (lambda bert, tmp: load(tmp, "texts"), r"has no config\.json that describes a model"),
        (lambda bert, tmp: load("vit_tiny_patch16_224", "texts"), "is a model for images, the data are texts"),
        (
            lambda bert, tmp: load("resnet10t", weights="none", options={"x": 1}),
            r"model\.options: resnet10t refuses them",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(call, message, bert, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        call(bert, tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_tokenizer_is_refused(bert, tmp_path):
    """transformers makes one of special tokens alone, which takes every word for an unknown one."""
    for file in bert.iterdir():
        if file.name in ("config.json", "model.safetensors"):
            shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer of .* knows no words"):
        load(tmp_path, "texts")


def test_damaged_weights_are_not_answered_by_random_ones(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(ValueError, match=r"bert cannot be loaded \(SafetensorError: [^;]*\)$"):
        load(folder, "texts", weights="pretrained")


def test_a_name_that_cannot_be_fetched_says_why(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fails)
    with pytest.raises(ValueError, match=r"cannot be fetched .*\(OSError: We couldn't connect to the hub\)$"):
        load("user/model", "texts")


def test_weights_that_cannot_be_fetched_are_named(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("no connection\nat all")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(ValueError, match=r"resnet10t cannot be loaded \(OSError: no connection\); pass --weights none"):
        load("resnet10t", weights="pretrained")
