"""The cost figure of GPS: training and serving ViT-B/16 with every method, batch 32, in float32 and in bfloat16.

The cost figure of GPS (CVPR 2024) compares time and memory of training and of inference at this batch size. Here the
images are random and mixed precision is off. Random weights, however, have gradients that spread over more columns than
those of trained weights. The model is therefore trained first, for some dozen steps, to fill in blank patches of
handwritten digits, and selections are taken from gradients on digits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradsel.experiments.cost.comparing import Comparison
from gradsel.experiments.cost.contenders import Batch, Row, Selections, Task, inference, training
from gradsel.experiments.cost.methods import FULL, LORA, OURS, PUBLISHED, for_vit
from gradsel.experiments.cost.pretraining import digit_images, drawn, masked_patches, pretrained
from gradsel.experiments.cost.timing import ERROR, first_line, release
from gradsel.papers.vit import VisionTransformer
from gradsel.ranking import contrastive, cross_entropy
from gradsel.selection import Selection

CLASSES = 100
TOY = {"image_size": 32, "patch": 8, "dim": 64, "depth": 2, "heads": 4}
SECONDS = 20.0  # for the rounds of one comparison
PRETRAINING, SELECTING = 50, 4  # batches of digits
CHECKED_RATE, TOLERANCE = 1e-3, 2e-5

# --- Weights and data --------------------------------------------------------------------------------------------


def random_batch(samples: int, side: int, device: str, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, side, side, generator=generator)
    return images.to(device), torch.randint(CLASSES, (samples,), generator=generator).to(device)


def model_and_selections(
    device: str, config: dict[str, int], kept: Path | None
) -> tuple[VisionTransformer, Selections, str]:
    """The model in float32, the selections on it, and a note if the model is not what it should be."""

    def make() -> VisionTransformer:
        return VisionTransformer(num_classes=CLASSES, **config)

    side = config.get("image_size", 224)
    try:
        draw = digit_images(side)
        steps = drawn(draw, 1, PRETRAINING, 8)
        model: Any = pretrained(make, masked_patches, steps, PRETRAINING, 8, "ViT", device, kept)
        batches = list(drawn(draw, 2, SELECTING, 16))
        note = ""
    except Exception as error:  # scikit-learn is missing, for example
        torch.manual_seed(0)
        model = make().to(device)
        images, _ = random_batch(16, side, device)
        batches = [(images, torch.arange(16) % 4)]
        note = f"random weights ({first_line(error)})"
    batches = [(images.to(device), labels.to(device)) for images, labels in batches]
    return model, Selections(model, batches, contrastive("forward_features")), note


# --- The comparisons ---------------------------------------------------------------------------------------------


def check(task: Task, base: nn.Module, batch: Batch) -> str:
    """How ours trains differently from the published way; empty if it does not. Otherwise its speed means nothing."""
    methods = {(method.name, method.k): method for method in for_vit(task, torch.float32)}
    losses = {}
    for name in (OURS, PUBLISHED):
        contender = methods[name, 1].build(copy.deepcopy(base))
        for group in contender.optimizer.param_groups if contender.optimizer else ():
            group["lr"] = CHECKED_RATE
        losses[name] = [contender.step(batch).item() for _ in range(3)]
        del contender
        release()
    one, other = losses[OURS], losses[PUBLISHED]
    told = f"losses of ours {one}, as published {other}"
    if not all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(one, other, strict=True)):
        return f"{told}: they differ"
    if not abs(other[2] - other[0]) > 10 * TOLERANCE * abs(other[0]):
        return f"{told}: nothing has been learned, so they prove nothing"
    print(told)
    return ""


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=None, benchmark=None, deterministic=None, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def run(context: Any, kept: Path | None = None) -> list[Row]:
    """Measures what is missing.

    Args:
        context: has ``device``, ``small``, ``deadline``, ``done`` and ``emit``, as :class:`Alone`.
        kept: a folder in which the model is kept for the next run.
    """
    try:
        with full_precision():
            return measured(context, kept)
    finally:
        release()


def measured(context: Any, kept: Path | None) -> list[Row]:
    config = TOY if context.small else {}
    prepared = functools.cache(lambda: model_and_selections(context.device, config, kept))
    planned = comparisons(context, prepared)
    if time.monotonic() > context.deadline or not any(comparison.missing(context) for comparison in planned):
        return []
    try:
        base, select, _ = prepared()
        side = base.patch_embed.proj.kernel_size[0] * math.isqrt(base.pos_embed.shape[1])
        wrong = check(task_of(select), base, random_batch(8, side, context.device))
    except Exception as error:  # then ours gets a line with its error below
        print(f"check: {first_line(error)}")
        wrong = ""
    rows = []
    if wrong:  # said in a line of its own; the others are about other methods, too
        rows = [planned[0].shared | {"k": 1, "method": "ours against as published", "extra": ERROR + wrong}]
        context.emit(rows[0])
    return [*rows, *(row for comparison in planned for row in comparison.measure(context))]


def task_of(select: Callable[..., Selection]) -> Task:
    return Task(cross_entropy, r"blocks\..*\.(qkv|proj|fc1|fc2)", "head", ("patch_embed.proj",), select)


def comparisons(context: Any, prepared: Callable[[], tuple[nn.Module, Selections, str]]) -> list[Comparison]:
    """Training and inference in both dtypes; nothing is prepared before an entry starts."""
    samples, side = (4, TOY["image_size"]) if context.small else (32, 224)
    size = f"{'toy ViT' if context.small else 'ViT-B/16'}, batch {samples}"
    seconds = 0.0 if context.small else SECONDS
    task = task_of(lambda *args: prepared()[1](*args))
    found = []
    for operation in ("training step", "inference"):
        for dtype in (torch.float32, torch.bfloat16):
            images, labels = random_batch(samples, side, context.device)
            batch = images.to(dtype), labels
            make = functools.partial(lambda dtype: copy.deepcopy(prepared()[0]).to(dtype), dtype)
            methods = for_vit(task, dtype)
            shared = {"part": "cost", "operation": operation, "size": size, "dtype": str(dtype).removeprefix("torch.")}
            if operation == "training step":
                entries = [training(method, make, batch, lambda: prepared()[2]) for method in methods]
                baseline, ratios = LORA, {"of_full": FULL, "of_bfloat16_lora": f"{LORA}, bfloat16 adapters"}
            else:
                entries = [entry for method in methods for entry in inference(method, make, batch[0])]
                baseline, ratios = "LoRA, unmerged", {"of_full": FULL}
            calls = 2 if dtype is torch.float32 else 4  # so that turns of both take more than their synchronisation
            found.append(Comparison(shared, entries, calls, seconds, baseline, ratios))
    return found
