"""The models whose training steps are measured, their data, and the selections made from gradients on that data."""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import gradsel
from gradsel.experiments.cost.contenders import Batch
from gradsel.experiments.cost.pretraining import digit_images, drawn, masked_patches, pretrained
from gradsel.papers.vit import VisionTransformer

SELECTION_BATCHES = 4
KEPT = Path(tempfile.gettempdir()) / "gradsel-benchmarks"

Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    output = model(batch[0])
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def contrastive(model: nn.Module, batch: Batch) -> Tensor:
    return gradsel.SupConLoss()(model.forward_features(batch[0]), batch[1])


@dataclass(frozen=True)
class Case:
    """A model, its data, and which of its layers the methods train.

    Attributes:
        size: its name in the results.
        draw: makes a random batch of a given number of samples.
        samples: size of the batch that is measured.
        selection_loss: the loss whose gradients select, on batches of ``selection_samples``.
        pretrain_loss: the loss by which the model is trained first, on ``pretrain_steps`` batches of
            ``pretrain_samples``.
        layers: regular expression of the linear layers that get adapters.
        entrances: the first trained layers; the gradient has to reach their outputs.
        head: the output layer.
        trains_head: every method trains the head; otherwise only the linear probe does, and all others freeze it.
    """

    size: str
    make: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], Batch]
    samples: int
    selection_loss: Loss
    selection_samples: int
    pretrain_loss: Loss
    pretrain_samples: int
    layers: str
    entrances: tuple[str, ...]
    head: str
    trains_head: bool
    pretrain_steps: int = 50

    def batches(self, seed: int, count: int, samples: int) -> Iterator[Batch]:
        return drawn(self.draw, seed, count, samples)

    def pretrained(self, device: str = "cpu") -> nn.Module:
        """The model after some training; its weights are kept in the temporary directory for the next run."""
        batches = self.batches(1, self.pretrain_steps, self.pretrain_samples)
        return pretrained(
            self.make, self.pretrain_loss, batches, self.pretrain_steps, self.pretrain_samples, self.size, device, KEPT
        )

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of parameters that no selection trains."""
        return () if self.trains_head else (f"{self.head}.*",)

    @functools.cached_property
    def gradient(self) -> gradsel.Criterion:
        """The gradients of one selection pass, which every policy reuses, in the order in which select() ranks."""
        model = self.pretrained()
        sums: list[Tensor] = []
        batches = self.batches(2, SELECTION_BATCHES, self.selection_samples)
        gradsel.select(
            model, batches, self.selection_loss, criterion=lambda _, grad: sums.append(grad) or grad,
            freeze=self.frozen, progress=False,
        )  # fmt: skip
        replayed = itertools.cycle(sums)
        return gradsel.Criterion("gradient", lambda weight, grad: next(replayed), needs_gradient=False)

    def select(self, model: nn.Module, policy: Any, criterion: str = "gradient") -> gradsel.Selection:
        chosen = self.gradient if criterion == "gradient" else criterion
        return gradsel.select(model, None, None, policy, chosen, freeze=self.frozen, progress=False)


def vit(size: str, samples: int, **config: int) -> Case:
    """A vision transformer that has seen handwritten digits, with a fresh head to tell them apart."""
    config = {"num_classes": 10, **config}
    side = config.get("image_size", 224)
    return Case(
        size, lambda: VisionTransformer(**config), digit_images(side), samples, contrastive, selection_samples=16,
        pretrain_loss=masked_patches, pretrain_samples=8,
        layers=r"blocks\..*\.(qkv|proj|fc1|fc2)", entrances=("patch_embed.proj",), head="head", trains_head=True,
    )  # fmt: skip


def llama(size: str, tokens: int, **config: int) -> Case:
    """A decoder that reads the source text of Python's standard library, byte by byte."""
    config = {"vocab_size": 1000, "num_hidden_layers": 1, "max_position_embeddings": tokens, **config}

    @functools.cache
    def text() -> Tensor:
        files = sorted(Path(argparse.__file__).parent.glob("*.py"))[:60]
        return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()

    def draw(count: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(text()) - tokens, (count, 1), generator=generator)
        window = text()[starts + torch.arange(tokens + 1)]
        return window[:, :-1], window[:, 1:]

    def make() -> nn.Module:
        settings = transformers.LlamaConfig(**config, use_cache=False, attn_implementation="sdpa")
        return transformers.LlamaForCausalLM(settings)

    return Case(
        size, make, draw, 1, cross_entropy, selection_samples=1, pretrain_loss=cross_entropy, pretrain_samples=1,
        layers=r"model\.layers\..*_proj", entrances=tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv"),
        head="lm_head", trains_head=False,
    )  # fmt: skip


CASES = {
    "vit-b8": vit("ViT-B/16, batch 8", 8),
    "vit-b32": vit("ViT-B/16, 2 blocks, batch 32", 32, depth=2),
    "llama": llama(
        "Llama, 1 block of 2048, 512 tokens", 512,
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
    ),
}  # fmt: skip
SMALL = (
    vit("small ViT", 16, image_size=32, patch=8, dim=64, depth=2, heads=4),
    llama("small Llama", 64, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2),
)
