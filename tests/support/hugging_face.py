"""Small models built from transformers configurations, with batches and a loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def hugging_face(name: str) -> tuple[nn.Module, list]:
    """A small model built from its transformers configuration, and batches for it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "ViT":
        config = transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16,
            patch_size=4, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    elif name == "ConvNeXt":
        config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5)
        model = transformers.ConvNextForImageClassification(config)
    elif name == "GPT-2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0.0,
                                         embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=name == "tied Llama",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    if name in ("ViT", "ConvNeXt"):
        size = 16 if name == "ViT" else 32
        inputs = [(torch.randn(4, 3, size, size, generator=generator), torch.randint(0, 5, (4,), generator=generator))
                  for _ in range(4)]  # fmt: skip
    else:
        inputs = [(torch.randint(0, 50, (2, 12), generator=generator),) for _ in range(4)]
    return model.train(), inputs


def model_loss(model: nn.Module, batch: tuple) -> Tensor:
    if len(batch) == 2:
        return F.cross_entropy(model(batch[0].to(model.dtype)).logits, batch[1])
    return model(input_ids=batch[0], labels=batch[0]).loss
