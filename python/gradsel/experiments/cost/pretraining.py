"""Weights that are not random, made in some fifty steps: a vision transformer fills in blank patches of digits.

Random weights have gradients that spread over more columns than those of trained weights, so selections on them read
more inputs and cost more.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from tqdm.auto import tqdm

from gradsel.experiments.cost.contenders import Batch

Draw = Callable[[int, torch.Generator], Batch]


def pretrained(
    make: Callable[[], nn.Module],
    loss: Callable[[Any, Batch], Tensor],
    batches: Iterable[Batch],
    steps: int,
    samples: int,
    name: str,
    device: str = "cpu",
    kept: Path | None = None,
) -> nn.Module:
    """A new model of seed 0 after some steps of AdamW.

    Args:
        make: makes the model, on the CPU.
        batches: as many as there are steps, each of ``samples`` samples.
        name: of the model, in the progress bar.
        kept: a folder in which the weights are kept for the next run.
    """
    torch.manual_seed(0)
    model = make()
    described = f"{model} {getattr(loss, '__name__', loss)} {samples} {steps} {torch.__version__} {device}"
    path = None if kept is None else kept / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.pt"
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.to(device)
    model.to(device)
    optimizer = AdamW(model.parameters(), lr=3e-4, fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    losses = []
    for inputs, targets in tqdm(batches, desc=f"{name}: training first", total=steps, leave=False):
        optimizer.zero_grad()
        with torch.device(device):  # the loss draws its blank patches there
            found = loss(model, (inputs.to(device), targets.to(device)))
        found.backward()
        optimizer.step()
        warm_up.step()
        losses.append(found.item())
    print(f"{name}: trained for {len(losses)} steps, loss {losses[0]:.2f} to {sum(losses[-5:]) / 5:.2f}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


def masked_patches(model: Any, batch: Batch) -> Tensor:
    """SimMIM (Xie et al. 2022): from images with half of their patches blank, the pixels of all patches.

    The patch embedding is its own decoder. A vision transformer learns this in some fifty steps, unlike classification.
    """
    images, embed = batch[0], model.patch_embed.proj
    side = embed.kernel_size[0]
    kept = torch.rand(len(images), 1, images.shape[2] // side, images.shape[3] // side) < 0.5
    tokens = model.patch_embed(images * F.interpolate(kept.float(), scale_factor=side))
    tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + model.pos_embed
    pixels = model.norm(model.blocks(tokens))[:, 1:] @ embed.weight.flatten(1)
    return F.mse_loss(pixels, F.unfold(images, side, stride=side).mT)


def digit_images(side: int) -> Draw:
    """Draws scikit-learn's handwritten digits, as normalised images of 3 x ``side`` x ``side``, and which they are."""

    @functools.cache
    def data() -> Batch:
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.from_numpy(found.images).float().unsqueeze(1)
        return (images - images.mean()) / images.std(), torch.from_numpy(found.target)

    def draw(count: int, generator: torch.Generator) -> Batch:
        images, labels = data()
        chosen = torch.randint(len(labels), (count,), generator=generator)
        return F.interpolate(images[chosen], side, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), labels[chosen]

    return draw


def drawn(draw: Draw, seed: int, count: int, samples: int) -> Iterator[Batch]:
    """Random batches, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return (draw(samples, generator) for _ in range(count))
