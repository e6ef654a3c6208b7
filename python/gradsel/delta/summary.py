"""What a delta sets, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from gradsel.delta.coding import packed
from gradsel.delta.parts import Part
from gradsel.tables import grouped, printable, shape_text, starred, table


def summary(parts: Mapping[str, Part], notes: Mapping[str, Any]) -> str:
    """See ``Delta.__str__``."""
    keys = {
        name: (part.mask.shape, part.mask.label, "+".join(packed(part.mask)), _dtypes(part), part.mask.nnz)
        for name, part in parts.items()
    }
    sizes: Counter[tuple[str, object]] = Counter()  # of parts that are alike, gaps may take different numbers of bytes
    for name, part in parts.items():
        sizes[starred(name), keys[name]] += packed_bytes(part)
    rows = [
        (name, shape_text(shape), entries, stored_as or "-", dtypes, f"{nnz * count:,}", f"{size:,}")
        for (name, (shape, entries, stored_as, dtypes, nnz), count), size in zip(
            grouped(keys.items()), sizes.values(), strict=True
        )
    ]
    lines = table(("tensor", "shape", "entries", "as", "values", "set", "bytes"), rows)
    lines.append(totals(parts))
    lines += [printable(f"{key}: {value}") for key, value in notes.items()]
    return "\n".join(lines)


def totals(parts: Mapping[str, Part]) -> str:
    """How many entries of how many tensors are set, and the bytes that they take."""
    entries = sum(part.mask.nnz for part in parts.values())
    size = sum(map(packed_bytes, parts.values()))
    return f"{entries:,} entries of {len(parts)} tensors, {size:,} bytes"


def packed_bytes(part: Part) -> int:
    """Bytes of values and packed indices."""
    return part.values.nbytes + sum(tensor.nbytes for tensor in packed(part.mask).values())


def _dtypes(part: Part) -> str:
    """The dtype of the values and, if it is another one, that of the tensor."""
    values, tensor = (str(dtype).removeprefix("torch.") for dtype in (part.values.dtype, part.dtype))
    if part.differences:
        return f"{values} differences from {part.differences}"
    return values if values == tensor else f"{values} for {tensor}"
