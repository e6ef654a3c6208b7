"""What is trained in each block of a model and in each type of matrix, as in the GPS paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gradsel.masks import Mask
from gradsel.parameters.blocks import split_names
from gradsel.tables import table


@dataclass(frozen=True)
class Share:
    """What is trained of one type of matrix in one block.

    Attributes:
        trained: number of trained entries.
        total: number of all entries.
        ranked: number of trained entries that were ranked: those of parameters that are not trained whole.
        label: how they are trained, or why not.
    """

    trained: int
    total: int
    ranked: int
    label: str


class Blocks(Mapping[tuple[str, str], Share]):
    """What is trained, by block and type of matrix (see :func:`split_names`), in the order of the model; printable."""

    def __init__(self, masks: Mapping[str, Mask]) -> None:
        members: dict[tuple[str, str], list[Mask]] = {}
        for name, place in split_names(masks).items():
            members.setdefault(place, []).append(masks[name])
        self._shares = {place: _share(of) for place, of in members.items()}

    def __getitem__(self, place: tuple[str, str]) -> Share:
        return self._shares[place]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)

    def shares(self) -> dict[str, dict[str, float]]:
        """How the trained ranked entries are distributed: the fraction of all of them, by type, then by block.

        Types without such entries are left out, and so is ``""`` if none lie outside the blocks. Fractions add up to 1.
        """
        total = sum(share.ranked for share in self.values())
        outside = any(share.ranked for (block, _), share in self.items() if not block)
        blocks = dict.fromkeys(block for block, _ in self if block or outside)
        types = dict.fromkeys(kind for (_, kind), share in self.items() if share.ranked)
        return {
            kind: {block: self[block, kind].ranked / total if (block, kind) in self else 0.0 for block in blocks}
            for kind in types
        }

    def __str__(self) -> str:
        cells = []
        last = None
        for (block, kind), share in self.items():
            percent = f"{100 * share.trained / share.total:.2f} %" if share.total else "-"
            shown = "" if block == last else block or "(outside)"
            cells.append((shown, kind, f"{share.trained:,}", f"{share.total:,}", percent, share.label))
            last = block
        return "\n".join(table(("block", "matrix", "trained", "of", "share", "mask"), cells))


def _share(masks: list[Mask]) -> Share:
    labels = dict.fromkeys(mask.label if mask.nnz else f"frozen: {mask.label}" for mask in masks)
    return Share(
        trained=sum(mask.nnz for mask in masks),
        total=sum(mask.numel for mask in masks),
        ranked=sum(mask.nnz for mask in masks if not mask.is_whole),
        label=", ".join(labels),
    )
