"""A tiny Llama, and the tensors of its checkpoint."""

from __future__ import annotations

import torch
import transformers
from safetensors.torch import load_file


def llama(dtype=torch.float32, layers=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def saved(model, folder):
    """The tensors that save_pretrained writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")
