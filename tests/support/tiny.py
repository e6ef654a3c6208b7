"""Tiny models of timm and transformers, with random weights, and batches for them."""

from __future__ import annotations

import timm
import torch
import transformers
from torch import Tensor, nn

#: Arguments that make timm's vit_tiny_patch16_224 small.
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **VIT).eval()


def bert(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(bert_config(num_labels=classes)).eval()


def bert_config(**changes) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, **changes,
    )  # fmt: skip


def images(count: int = 8, size: int = 32) -> list[dict[str, Tensor]]:
    """Two batches with the keys that data collators give them."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(count, 3, size, size, generator=generator), "labels": torch.arange(count) % 3}
        for _ in range(2)
    ]


def texts(count: int = 8) -> list[dict[str, Tensor]]:
    """Two batches, the second padded."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(2):
        mask = torch.ones(count, 6, dtype=torch.long)
        mask[1::2, 4:] = 1 - number
        ids = torch.randint(1, 60, (count, 6), generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": torch.arange(count) % 3})
    return batches
