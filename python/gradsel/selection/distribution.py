"""What is trained in every block of a model and in every type of matrix, as the GPS paper looks at selections."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gradsel.masks import Mask
from gradsel.tables import table

_NUMBER = re.compile(r"(.*_)?\d+")


@dataclass(frozen=True)
class Part:
    """One type of matrix in one block.

    Attributes:
        trained: trained entries.
        total: entries there are.
        ranked: trained entries that had to compete: those of parameters that are not trained whole.
        how: how it is trained, or why not.
    """

    trained: int
    total: int
    ranked: int
    how: str


class Blocks(Mapping[tuple[str, str], Part]):
    """What is trained, by block and type of matrix, in the order of the model; printable. See :func:`split_names`."""

    def __init__(self, masks: Mapping[str, Mask]) -> None:
        members: dict[tuple[str, str], list[Mask]] = {}
        for name, place in split_names(masks).items():
            members.setdefault(place, []).append(masks[name])
        self._parts = {place: _part(of) for place, of in members.items()}

    def __getitem__(self, place: tuple[str, str]) -> Part:
        return self._parts[place]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def shares(self) -> dict[str, dict[str, float]]:
        """The distribution of the ranked entries that are trained: the share of all of them, by type, then by block.

        Types without any are left out, and so is what is outside blocks if there are none in it; shares add up to 1.
        """
        total = sum(part.ranked for part in self.values())
        outside = any(part.ranked for (block, _), part in self.items() if not block)
        blocks = dict.fromkeys(block for block, _ in self if block or outside)
        types = dict.fromkeys(kind for (_, kind), part in self.items() if part.ranked)
        return {
            kind: {block: self[block, kind].ranked / total if (block, kind) in self else 0.0 for block in blocks}
            for kind in types
        }

    def __str__(self) -> str:
        cells = []
        last = None
        for (block, kind), part in self.items():
            share = f"{100 * part.trained / part.total:.2f} %" if part.total else "-"
            shown = "" if block == last else block or "(outside)"
            cells.append((shown, kind, f"{part.trained:,}", f"{part.total:,}", share, part.how))
            last = block
        return "\n".join(table(("block", "matrix", "trained", "of", "share", "mask"), cells))


def _part(masks: list[Mask]) -> Part:
    how = dict.fromkeys(mask.how if mask.nnz else f"frozen: {mask.how}" for mask in masks)
    return Part(
        trained=sum(mask.nnz for mask in masks),
        total=sum(mask.numel for mask in masks),
        ranked=sum(mask.nnz for mask in masks if not mask.is_whole),
        how=", ".join(how),
    )


def split_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Block and type of matrix of every parameter, from names alone: ``("blocks.3", "attn.qkv.weight")``.

    A block ends with a number (``3``, ``encoder_layer_3``) that has modules with names of their own behind it, in this
    or in another parameter of the same list: the first such number of a name. Later numbers belong to the block if they
    have modules within modules behind them, like the blocks of Swin's stages and unlike experts or the layers of a
    Sequential. What is outside blocks has the block ``""``.

    In the type, the numbers of modules with names behind them are written as ``*``, so that experts are one type; the
    layers of a Sequential are types of their own.
    """
    names = list(names)
    depths: dict[str, int] = {}  # named modules behind the numbers of each list of modules, at most
    for name in names:
        for path, behind in _numbers(name):
            depths[_starred(path)] = max(depths.get(_starred(path), 0), len(behind))
    places = {}
    for name in names:
        block: list[str] = []
        for path, _ in _numbers(name):
            if depths[_starred(path)] >= (2 if block else 1):
                block = path
        rest = name.split(".")[len(block) :]
        deep = {len(path) - 1 for path, behind in _numbers(name) if behind}
        kind = [_star(part) if at in deep else part for at, part in enumerate(rest, start=len(block))]
        places[name] = (".".join(block), ".".join(kind))
    return places


def _numbers(name: str) -> Iterator[tuple[list[str], list[str]]]:
    """Every path in a name that ends with a number, and the named modules behind it."""
    modules = name.split(".")[:-1]
    for at, module in enumerate(modules):
        if _NUMBER.fullmatch(module):
            yield modules[: at + 1], [other for other in modules[at + 1 :] if not _NUMBER.fullmatch(other)]


def _starred(path: list[str]) -> str:
    return ".".join(map(_star, path))


def _star(part: str) -> str:
    return re.sub(r"\d+$", "*", part) if _NUMBER.fullmatch(part) else part
