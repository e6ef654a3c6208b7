"""What every task has: how its data are read, its model and loss, what is measured, and how that is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import Dataset

from gradsel.methods import Method
from gradsel.selection.selection import Selection
from gradsel.training.config import Config
from gradsel.training.data import Data, Split
from gradsel.training.models import Loaded
from gradsel.training.recipe import Recipe

Batch = dict[str, Tensor]
Sample = dict[str, Any]


class Task(ABC):
    """What a model is trained for. :mod:`gradsel.training.loop` knows tasks by this interface alone.

    Attributes:
        name: what it is called in settings and messages.
        selection_loss: ``loss(model, batch)`` of the task, for methods that rank by it; None: it has none of its own.
    """

    name: ClassVar[str]
    selection_loss: Callable[[Any, Any], Tensor] | None = None

    # --- Data, model, loss

    @abstractmethod
    def method(self, config: Config) -> Method:
        """The method that the settings name.

        Raises:
            ValueError: there is no such method or option, or the task cannot have it or another setting.
        """

    @abstractmethod
    def recipe(self, config: Config, how: Method, classes: int) -> Recipe:
        """Schedule and loss."""

    @abstractmethod
    def read(self, config: Config, *, only_test: bool = False) -> Data:
        """Reads and checks the data.

        Args:
            only_test: nothing is trained: there is a test set only, of all the data if they have none of their own.

        Raises:
            ValueError: something is wrong with them.
        """

    @abstractmethod
    def load(self, config: Config, classes: Sequence[str], kind: str) -> Loaded:
        """Makes the model.

        Args:
            kind: of the data.

        Raises:
            ValueError: there is no such model, or it is for another task or kind of data.
        """

    @abstractmethod
    def datasets(
        self, splits: Mapping[str, Split], loaded: Loaded, config: Config
    ) -> tuple[dict[str, Dataset[Sample]], Dataset[Sample], bool]:
        """The data sets by split, the one to select on, and whether its samples have several views."""

    @abstractmethod
    def testing(self, split: Split, loaded: Loaded, config: Config) -> Dataset[Sample]:
        """A data set to test on."""

    @abstractmethod
    def collate(self, loaded: Loaded) -> Callable[[Sequence[Sample]], Batch]:
        """What makes a batch of samples."""

    @abstractmethod
    def outputs(self, model: nn.Module, inputs: Batch) -> Tensor:
        """What the model says about a batch, [batch, ...]."""

    # --- Metrics and how they are shown

    @abstractmethod
    def metric(self, config: Config) -> str:
        """The entry of :meth:`score` whose largest value marks the best epoch."""

    @abstractmethod
    def score(self, prediction: Any, config: Config) -> dict[str, float]:
        """The metrics of the validation set, for transformers' Trainer, in percent.

        Args:
            prediction: ``transformers.EvalPrediction``.
        """

    @abstractmethod
    def metrics(self, outputs: Tensor, labels: Tensor, classes: Sequence[str], config: Config) -> dict[str, Any]:
        """All metrics of a data set, as JSON can hold them; ``samples`` among them."""

    @abstractmethod
    def rows(self, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The metrics that matter, by name, the first one first."""

    @abstractmethod
    def described(self, metrics: Mapping[str, Any]) -> str:
        """All metrics, for a terminal."""

    @abstractmethod
    def pipeline(self, kind: str) -> str:
        """What model hubs call the task on data of a kind."""

    @abstractmethod
    def hub_metrics(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The metrics that model hubs read, by the names they have there."""

    @abstractmethod
    def summary(self, results: Mapping[str, Any]) -> str:
        """The result in a sentence."""

    @abstractmethod
    def example(self, folder: str, given: str) -> str:
        """Python that predicts, below ``import gradsel``.

        Args:
            given: an input, as Python.
        """

    @abstractmethod
    def report(
        self, folder: Path, config: Config, results: dict[str, Any], data: Data, outputs: Tensor, labels: Tensor,
        selection: Selection | None,
    ) -> None:  # fmt: skip
        """Writes report.html.

        Args:
            outputs, labels: of the test set.
            selection: what was trained, if it was not everything.
        """
