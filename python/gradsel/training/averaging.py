"""An exponential moving average of what is trained, and of nothing else (Polyak & Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers.trainer_callback import TrainerCallback

from gradsel.files import replacing
from gradsel.tensor_files import load_file, save_file

#: The file in a checkpoint.
AVERAGE = "average.safetensors"


class Average(TrainerCallback):
    """Averages values after every step: ``average = decay * average + (1 - decay) * values``, by torch.

    It begins with the values before the first step. Values that are not floating-point numbers, such as counters, are
    copied. When training ends, the model gets the averages.

    Args:
        decay: of the average.
        values: returns aliases of the values by name: of parameters that are trained, and of buffers. For an attached
            model these are its selected values, so the average is as small as they are.
    """

    def __init__(self, decay: float, values: Callable[[], dict[str, Tensor]]) -> None:
        self._update: Any = get_ema_multi_avg_fn(decay)
        self._values = values
        self._average: dict[str, Tensor] | None = None
        self._averaged: tuple[list[Tensor], list[Tensor]] = [], []
        self._copied: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values = self._values()
        if self._average is None:  # else it is that of a checkpoint
            self._average = {name: tensor.clone() for name, tensor in values.items()}
        pairs = [(self._average[name], tensor) for name, tensor in values.items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averaged = [average for average, _ in floating], [value for _, value in floating]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(*self._averaged, None)
        for average, value in self._copied:
            average.copy_(value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.to_model()

    @property
    def has_begun(self) -> bool:
        """Whether there is an average."""
        return self._average is not None

    @property
    def average(self) -> dict[str, Tensor]:
        """The averages by name.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._average is None:
            raise RuntimeError("there is no average before training has begun")
        return self._average

    @torch.no_grad()
    def to_model(self) -> None:
        """Gives the model the averages for good."""
        for name, tensor in self._values().items():
            tensor.copy_(self.average[name])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Gives the model the averages for the time being."""
        before = {name: tensor.clone() for name, tensor in self._values().items()}
        self.to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._values().items():
                    tensor.copy_(before[name])

    def save(self, folder: Path) -> None:
        """Writes the averages to a checkpoint."""
        with replacing(folder / AVERAGE) as unfinished:
            save_file(self.average, unfinished)

    def load(self, folder: Path) -> None:
        """Reads the averages of a checkpoint.

        Raises:
            ValueError: it has none, or those of other values.
        """
        if not (folder / AVERAGE).is_file():
            raise ValueError(f"{folder} has no {AVERAGE}: it was saved without recipe.ema")
        saved, values = load_file(folder / AVERAGE), self._values()
        if {name: tensor.shape for name, tensor in saved.items()} != {n: t.shape for n, t in values.items()}:
            raise ValueError(f"{folder} has averages of other values than those that are trained")
        self._average = {name: tensor.to(values[name].device) for name, tensor in saved.items()}
