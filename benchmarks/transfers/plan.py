"""What is run on each of the two transfers, under which settings, and what each method is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.transfers.data import DIGITS, REVIEWS
from gradsel.training import Config

SEEDS = 5
#: Learning rates that are tried, as multiples of the method's own; one run each, judged on the validation set.
FACTORS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {REVIEWS: (2 / 3, 2.0, 6.0), DIGITS: (2.0, 6.0, 18.0, 54.0)}
)

_SHARED: Mapping[str, Any] = MappingProxyType({
    "device": "cpu",
    "recipe.batch_size": 8,
    "recipe.warmup": "inside",  # GRFT's own is on top of the epochs
})  # fmt: skip
_SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    REVIEWS: {"model": "minilm", "data.max_length": 24, "recipe.epochs": 4, "output.save_steps": 96},
    DIGITS: {
        "model": "efficientnet", "data.image_size": 64, "data.augmentation": "none", "recipe.epochs": 4,
        "output.save_steps": 100,  # the last step, so that no epoch is chosen
    },
})  # fmt: skip

#: Weights per neuron of GPS that are about half as many in all as those of LoRA of rank 8.
K: Mapping[str, int] = MappingProxyType({REVIEWS: 7, DIGITS: 4})
#: The method that the others are compared with, the same with random weights, and with the other loss for selection.
HALF = {transfer: f"gps:k={k}" for transfer, k in K.items()}
CHANCE = {transfer: f"{half}:criterion=random" for transfer, half in HALF.items()}
ENTROPY = {transfer: f"{half}:loss=cross-entropy" for transfer, half in HALF.items()}
_MAIN = {transfer: ("full", "linear", "bias", "lora", HALF[transfer], CHANCE[transfer], "gps") for transfer in K}
#: The table: every method that fits, and where it has a size, with about half as many weights as LoRA of rank 8.
TABLE: Mapping[str, tuple[str, ...]] = MappingProxyType({
    REVIEWS: (
        *_MAIN[REVIEWS], "lora:rank=4", "grft:columns=7", "grft:rows=7", "adapter", "ssf", "spt-lora", "spt-adapter",
        "shira:rank=4", "miss:rank=8", "paca:columns=8", "gps:k=16",
    ),
    DIGITS: (
        *_MAIN[DIGITS], "lora:rank=4", "grft:columns=4", "grft:rows=7", "adapter", "ssf", "spt-lora", "spt-adapter",
        "paca:columns=8", "gps:k=16",
    ),
})  # fmt: skip
#: Weights per neuron for which gradients are compared with chance.
KS = {transfer: (1, k, 16) for transfer, k in K.items()}


def of_k(k: int) -> tuple[str, str, str]:
    """GPS with ``k`` weights per neuron by the contrastive loss, by cross-entropy and at random."""
    stem = "gps" if k == 1 else f"gps:k={k}"
    return stem, f"{stem}:loss=cross-entropy", f"{stem}:criterion=random"


def _search(transfer: str) -> tuple[str, ...]:
    criteria = ("relative", "snip", "fisher")
    scopes = ("mass", "layer", "net")
    ways = (
        *(f"criterion={each}" for each in criteria), *(f"scope={each}" for each in scopes), "columns=48", "ratio=3",
        "reselect=1",
    )  # fmt: skip
    return tuple(f"{HALF[transfer]}:{way}" for way in ways)


#: What might help at equal cost, besides the loss for selection.
SEARCH = {transfer: _search(transfer) for transfer in K}
#: Two weights per neuron, confined to a number of inputs, which is the rank of the LoRA that serves the result.
RANKS = tuple(f"gps:k=2:columns={columns}" for columns in (2, 4, 8, 16, 32))
ALL_INPUTS = "gps:k=2"
#: What is run, in this order: first what the main questions need.
STAGES = (
    (REVIEWS, (*_MAIN[REVIEWS][:6], SEARCH[REVIEWS][0], "gps", "gps:criterion=random")),
    (DIGITS, ("lora", HALF[DIGITS], CHANCE[DIGITS], "full", "linear", SEARCH[DIGITS][0])),
    (REVIEWS, TABLE[REVIEWS]), (DIGITS, TABLE[DIGITS]),
    *((transfer, tuple(way for k in KS[transfer] for way in of_k(k))) for transfer in K),
    (REVIEWS, SEARCH[REVIEWS]), (REVIEWS, (ALL_INPUTS, *RANKS)), (DIGITS, SEARCH[DIGITS]),
)  # fmt: skip


def settings(root: Path, transfer: str, output: Path) -> Config:
    """The settings of all runs of a transfer.

    Args:
        root: what :func:`benchmarks.transfers.data.make` has written.
        output: the folder of the comparison.
    """
    own = dict(_SETTINGS[transfer])
    model = root / own.pop("model")
    return Config().replaced({
        **_SHARED, **own, "model.name": str(model), "data.path": str(root / transfer), "output.folder": str(output),
    })  # fmt: skip
