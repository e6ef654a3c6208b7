"""An experiment of a paper as data, and the runs that it consists of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gradsel.errors import did_you_mean
from gradsel.experiments.papers.sources import SOURCES, names_of, plain

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
        model: the paper's name of the model.
        method: the paper's name of the method.
        data: a name of :data:`gradsel.experiments.papers.sources.SOURCES`; empty if no data are needed.
        setting: the paper's name of what is varied; empty if nothing is.
        seed: offset to that of the run.
    """

    model: str
    method: str
    data: str
    setting: str
    seed: int

    def __str__(self) -> str:
        parts = (self.model, self.method, self.data, self.setting, f"seed {self.seed}" if self.seed else "")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Methods × data sets × settings × seeds, and what is measured.

    Attributes:
        name: ``gps/table2``, ``grft/fig4-rows``, ...
        title: what it shows.
        paper: ``"gps"`` or ``"grft"``: whose presets the methods without a preset of their own are trained by.
        source: where the paper has it.
        methods: by the paper's name, the library's, with options after colons as in ``gradsel compare``. The option
            ``preset`` stands for the number that the preset has (``grft:sparse=preset``).
        data: names of data sets.
        models: by the paper's name, the key in :data:`gradsel.training.presets.MODELS`, or an id.
        base: settings of all runs, by dotted names.
        settings: what is varied: by the paper's name, settings by dotted names.
        measure: a key of :data:`gradsel.experiments.papers.measures.MEASURES`.
        metrics: the values of a measure that tables show; others are in the results file.
        also: data sets that a measure needs besides.
        without: models and methods that do not go together.
        seeds: runs of each.
        notes: what is known to differ from the paper.
    """

    name: str
    title: str
    paper: str
    source: str
    methods: Mapping[str, str]
    data: Sequence[str] = ()
    models: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({"ViT-B/16": "vit-b-16"}))
    base: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({"": _NOTHING}))
    measure: str = "accuracy"
    metrics: Sequence[str] = ("top1",)
    also: Sequence[str] = ()
    without: Collection[tuple[str, str]] = ()
    seeds: int = 1
    notes: Sequence[str] = ()

    def cells(self, only: Iterable[str] = (), seeds: int | None = None) -> list[Cell]:
        """Its runs.

        Args:
            only: names of models, methods, data sets and settings; of each of these, all if none is named.
            seeds: runs of each; None: as in the paper.

        Raises:
            ValueError: a name is that of nothing in this experiment.
        """
        if seeds is not None and seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {seeds}")
        known: list[tuple[Sequence[str], Callable[[str], set[str]]]] = [
            (tuple(self.models), lambda name: {plain(name), plain(self.models[name])}),
            (tuple(self.methods), lambda name: {plain(name), plain(self.methods[name])}),
            (tuple(self.data) or ("",), lambda name: names_of(name) if name else set()),
            (tuple(self.settings), lambda name: {plain(name)} - {""}),
        ]
        wanted = {plain(name): name for name in only}
        chosen = []
        met: set[str] = set()
        for names, aliases in known:
            hits = [name for name in names if aliases(name) & wanted.keys()]
            met |= {alias for name in names for alias in aliases(name)} & wanted.keys()
            chosen.append(hits or list(names))
        if strange := [name for key, name in wanted.items() if key not in met]:
            there = {plain(name): name for part, _ in known for name in part if name}
            hint = did_you_mean(plain(strange[0]), there)
            raise ValueError(f"--only: {self.name} has no {strange[0]!r}; it has {', '.join(there.values())}{hint}")
        models, methods, data, settings = chosen
        count = range(self.seeds if seeds is None else seeds)
        cells = [Cell(*each) for each in itertools.product(models, methods, data, settings, count)]
        cells = [cell for cell in cells if (cell.model, cell.method) not in self.without]
        if not cells:
            raise ValueError(f"--only: {', '.join(methods)} does not fit {', '.join(models)}")
        return cells

    def needed(self, cells: Iterable[Cell]) -> list[str]:
        """The data sets that these runs need."""
        return list(dict.fromkeys([*(cell.data for cell in cells if cell.data), *self.also]))

    def __post_init__(self) -> None:
        assert all(name in SOURCES for name in (*self.data, *self.also)), self.name
