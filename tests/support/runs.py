"""Small data sets and models on disk, configurations of runs with them, and how runs are stopped and compared."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from gradsel.training import Config, Result
from tests.support import tiny

COLOURS = ("red", "green", "blue")


def image_folder(root: Path, **sizes: int) -> Path:
    """Noisy pictures in three colours: ``root/split/class/number.png``; without sizes ``root/class/number.png``."""
    drawn = np.random.default_rng(0)
    for split, count in (sizes or {"": 6}).items():
        for channel, colour in enumerate(COLOURS):
            folder = root / split / colour
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = drawn.integers(0, 160, (36, 40, 3), dtype=np.uint8)
                pixels[..., channel] = drawn.integers(96, 255, (36, 40))
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def reviews(path: Path, count: int = 24) -> Path:
    """A table of short texts with the classes bad and good."""
    words = {"good": "fine great warm", "bad": "cold awful broken"}
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for number in range(count):
            label = ("bad", "good")[number % 2]
            own = words[label].split()
            table.writerow([f"the {own[number % 3]} {own[(number + 1) % 3]} thing {'here ' * (number % 4)}", label])
    return path


def bert_folder(root: Path) -> Path:
    """A tiny BERT with its tokenizer, as transformers saves them."""
    import transformers

    words = ["the", "fine", "great", "warm", "cold", "awful", "broken", "thing", "here", "a", "b", "c"]
    root.mkdir(parents=True)
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(root / "vocab.txt"), vocab=str(root / "vocab.txt"))
    tokenizer.save_pretrained(root)
    torch.manual_seed(5)
    transformers.BertModel(tiny.bert_config()).save_pretrained(root)
    return root


def image_run(data: Path, output: Path, **changes: Any) -> Config:
    """A run of a tiny ViT with random weights; changes by dotted names with ``__`` for the dot."""
    values = {
        "data": {"path": str(data)},
        "model": {"name": "vit_tiny_patch16_224", "weights": "none", "options": dict(tiny.VIT)},
        "recipe": {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "mixup": 0.8, "cutmix": 1.0},
        "output": {"folder": str(output), "report": False},
        "device": "cpu",
    }
    return Config.from_dict(values).replaced({name.replace("__", "."): value for name, value in changes.items()})


def text_run(data: Path, model: Path, output: Path, **changes: Any) -> Config:
    """A run of a tiny BERT."""
    values = {
        "data": {"path": str(data)},
        "model": {"name": str(model)},
        "recipe": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2},
        "output": {"folder": str(output), "report": False},
        "device": "cpu",
    }
    return Config.from_dict(values).replaced({name.replace("__", "."): value for name, value in changes.items()})


class Interrupt(TrainerCallback):
    """Sends a signal after a step, as Ctrl-C does, or raises, as a crash does."""

    def __init__(self, step, crash=False):
        self.step, self.crash = step, crash

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.crash:
                raise RuntimeError("killed")
            os.kill(os.getpid(), signal.SIGINT)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a result by file and name."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        if "checkpoints" not in file.parts
        for name, tensor in load_file(file).items()
    }


def check_same_result(first: Result, second: Result) -> None:
    """Two runs have given the same bits, and the same results but for the seconds."""
    ours, theirs = tensors(first.folder), tensors(second.folder)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for name in first.results.keys() - {"seconds"}:
        assert first.results[name] == second.results[name], name
