"""Many tasks on one model: switching writes only the entries of the old and the new task."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from torch import Tensor, nn

from gradsel.delta import bank_files
from gradsel.delta.applying import Overlay, fit, require_in_place
from gradsel.delta.combining import paired
from gradsel.delta.delta import Delta
from gradsel.delta.heads import Head
from gradsel.delta.parts import write_
from gradsel.delta.sites import Site, require_plain
from gradsel.interrupts import uninterrupted
from gradsel.masks import Mask, same
from gradsel.selection.overlap import Overlap, overlap
from gradsel.tables import table


@dataclass
class _Task:
    delta: Delta
    sites: list[Site]
    originals: list[Tensor]
    overwritten: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def masks(self) -> dict[str, Mask]:
        """The entries that it sets, by the names of the tensors in the model."""
        return {site.name: site.part.mask for site in self.sites}

    def overwritten_by(self, name: str, other: _Task) -> frozenset[str]:
        """The tensors of which another task, ``name``, sets the same entries, so that restoring them is unnecessary."""
        if name not in self.overwritten:
            ours, theirs = self.masks, other.masks
            self.overwritten[name] = frozenset(key for key in ours if key in theirs and same(ours[key], theirs[key]))
        return self.overwritten[name]


def _put(task: _Task) -> None:
    """Writes the entries of a task."""
    for site in task.sites:
        if isinstance(site, Head):
            site.put()
        else:
            write_(site.tensor, site.part, site.values)


def _restore(task: _Task, but: frozenset[str] = frozenset()) -> None:
    """Writes back the entries of the base that a task replaces, except in the tensors ``but``."""
    for site, entries in zip(task.sites, task.originals, strict=True):
        if site.name in but:
            continue
        if isinstance(site, Head):
            site.take_off()
        else:
            write_(site.tensor, site.part, entries)


class TaskBank(Overlay):
    """Deltas of one base model, of which at most one is in the model at a time.

    Switching is exact to the bit, in any order. It writes in place: parameters stay the same objects at the same
    addresses, and code compiled by torch.compile stays valid. Do not switch during a forward pass.

    A task that sets its head whole may have another number of classes than the model: the head's parameters then get
    the task's memory while it is active, and torch.compile compiles once for each size.

    Args:
        model: the plain base, wrapped or not, without a task.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._tasks: dict[str, _Task] = {}
        self._active: str | None = None

    def add(self, name: str, delta: Delta | str | os.PathLike[str], *, force: bool = False) -> None:
        """Adds a task without switching to it, and computes the indices of its entries.

        Args:
            name: any unused name.
            delta: a delta, or the path of its file.
            force: see :meth:`gradsel.delta.Delta.apply_`.

        Raises:
            ValueError: the name is taken, or the delta is for another model or base.
        """
        if name in self._tasks:
            raise ValueError(f"the bank has a task {name!r} already; remove it first")
        delta = delta if isinstance(delta, Delta) else Delta.load(delta, force=force)
        require_plain(self._model)
        active = self._active
        self.activate(None)  # the task replaces entries of the base
        try:
            sites, originals = fit(delta, self._model, force, own_heads=True)
        finally:
            self.activate(active)
        self._tasks[name] = _Task(delta, sites, originals)

    def activate(self, name: str | None) -> None:
        """Switches to a task, or with None to the base, from whatever task is active.

        Raises:
            KeyError: there is no such task.
            RuntimeError: something else was applied to the same tensors; or the model was attached, moved or cast, or
                got other tensors, since the task was added. Nothing has been written.
        """
        if name is not None and name not in self._tasks:
            raise KeyError(f"the bank has no task {name!r}; it has {', '.join(self._tasks) or 'none'}")
        if name == self._active:
            return
        new = None if name is None else self._tasks[name]
        old = None if self._active is None else self._tasks[self._active]
        sites = list(old.sites) if old else []
        exchanged = {id(site.tensor) for site in sites if isinstance(site, Head)}
        sites += [site for site in (new.sites if new else ()) if id(site.tensor) not in exchanged]
        require_in_place(sites, self._model)
        self._require_alone(sites)
        with uninterrupted():
            try:
                if old:
                    rewritten = old.overwritten_by(name, new) if new and name is not None else frozenset()
                    _restore(old, rewritten)
                if new:
                    _put(new)
            except BaseException:  # rather the base than parts of two tasks
                for task in filter(None, (new, old)):
                    _restore(task)
                self._active = None
                self._take_off()
                raise
            self._active = name
            if new:
                self._put_on(new.sites)
            else:
                self._take_off()

    def remove(self, name: str) -> None:
        """Removes a task; if it is active, the model becomes the base.

        Raises:
            KeyError: there is no such task.
        """
        if name == self._active:
            self.activate(None)
        if self._tasks.pop(name, None) is None:
            raise KeyError(f"the bank has no task {name!r}")
        for task in self._tasks.values():
            task.overwritten.pop(name, None)

    @property
    def active(self) -> str | None:
        """The task that is in the model, or None."""
        return self._active

    @property
    def names(self) -> tuple[str, ...]:
        """All tasks in the order they were added."""
        return tuple(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __getitem__(self, name: str) -> Delta:
        return self._tasks[name].delta

    def overlap(self, *, whole: bool = False) -> TaskOverlap:
        """How many entries each pair of tasks shares. Heads of different sizes share none.

        Args:
            whole: also count tensors that either task sets whole, such as biases.
        """
        return TaskOverlap(
            {
                (a, b): overlap(*paired(*_of_one_size(first.masks, second.masks)), whole)
                for (a, first), (b, second) in combinations(self._tasks.items(), 2)
            }
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes every task to a delta of its own in a folder, with an index, ``bank.json``.

        All appear together: a crash leaves the old bank of this folder, or for a moment no index, and so no bank.

        Raises:
            OSError: a file cannot be written.
        """
        bank_files.save(Path(folder), {name: task.delta for name, task in self._tasks.items()})

    @staticmethod
    def load(model: nn.Module, folder: str | os.PathLike[str], *, force: bool = False) -> TaskBank:
        """The bank that :meth:`save` wrote, for its base.

        Args:
            model: the plain base, wrapped or not, without a task.
            folder: the folder, which may be untrusted.
            force: see :meth:`gradsel.delta.Delta.apply_`.

        Raises:
            ValueError: the folder has no bank, or one of its tasks is damaged, or is for another model or base.
        """
        bank = TaskBank(model)
        for name, path in bank_files.tasks_in(Path(folder)).items():
            bank.add(name, path, force=force)
        return bank

    def __repr__(self) -> str:
        return f"TaskBank({', '.join(self._tasks)}; active: {self._active})"


def _of_one_size(a: Mapping[str, Mask], b: Mapping[str, Mask]) -> list[dict[str, Mask]]:
    """The masks of two tasks without those of heads of different sizes."""
    other = {name for name, mask in a.items() if name in b and b[name].shape != mask.shape}
    return [{name: mask for name, mask in masks.items() if name not in other} for masks in (a, b)]


class TaskOverlap(Mapping[tuple[str, str], Overlap]):
    """The overlap of every pair of tasks, by their names; printable."""

    def __init__(self, pairs: Mapping[tuple[str, str], Overlap]) -> None:
        self._pairs = dict(pairs)

    def __getitem__(self, pair: tuple[str, str]) -> Overlap:
        return self._pairs[pair] if pair in self._pairs else self._pairs[pair[::-1]]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __str__(self) -> str:
        rows = [
            (a, b, f"{found.shared:,}", f"{found.a:,}", f"{found.b:,}", f"{100 * found.share:.1f} %")
            for (a, b), found in self.items()
        ]
        return "\n".join(table(("task", "task", "shared", "first sets", "second sets", "of the smaller"), rows))
